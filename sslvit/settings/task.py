"""Settings of the tasks: MAE, DINO, iGPT and supervised training, and their common base."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

from sslvit.files import expand_path
from sslvit.settings.choices import check_bounds, checked

IMAGES_PER_PROTOTYPE = 20  # ImageNet's 1.28 M images for 65,536 outputs (Caron et al. 2021, section 3.2)
PAPER_BATCH, PAPER_MOMENTUM = 1024, 0.996  # section 3.2, "Implementation details"
MIN_AVERAGES_PER_RUN = 10  # the teacher averages over at most this fraction (1/10) of a run


@dataclass(frozen=True)
class Usual:
    """Usual batch size, length and learning rate of a task, used where settings are null.

    Args:
        batch: Maximum number of images per optimizer step.
        epochs: Passes over a data set of at most ImageNet's size.
        images: Maximum number of images in all passes together.
        base_lr: Learning rate per 256 images of a batch, for a batch of the maximum size.
    """

    batch: int
    epochs: float
    images: float
    base_lr: float

    def base_lr_at(self, global_batch_size: int) -> float:
        """The base learning rate for which the peak grows with the square root of the batch size.

        This is the rule for adaptive optimizers (Malladi et al. 2022). With a linear rule, the learning rate would be
        too small for the small batches of a small data set.
        """
        return float(f"{self.base_lr * math.sqrt(self.batch / global_batch_size):.3g}")


class TaskSettings:
    """Base of a task's settings."""

    name: str
    usual: ClassVar[Usual] = Usual(batch=256, epochs=100, images=1.28e8, base_lr=5e-4)

    def fitted(self, images: int, global_batch_size: int, total_steps: int, classes: int | None = None) -> Self:
        """Replace every null by a value that suits the job; the base class has none."""
        return self

    def check_micro_batch(self, micro: int) -> None:
        """Raise ValueError if the task needs larger micro-batches."""

    def suggestion(self, symptom: str, lr: str) -> str:
        """Suggest which setting to change after training has failed.

        Args:
            symptom: Symptom of the failure: even (all prototypes are equally likely) or one prototype (tasks/dino.py).
            lr: Key and value of the learning rate, as text.
        """
        return f"Lower {lr}, or raise data.global_batch_size."


@dataclass
@checked("task.")
class MAESettings(TaskSettings):
    """Reconstruct masked patches from a few visible ones (He et al. 2022)."""

    # the paper's 800 epochs of ImageNet; its peak of 2.4e-3 at a batch size of 4096, scaled by the square root
    usual: ClassVar[Usual] = Usual(batch=1024, epochs=800, images=1.03e9, base_lr=3e-4)
    name: Literal["mae"] = "mae"
    """Name of the task."""
    mask_ratio: float = 0.75
    """Fraction of patches hidden from the encoder."""
    target: Literal["normalized", "raw"] = "normalized"
    """Reconstruction target: normalized (each patch by its own mean and variance) or raw pixels."""
    hog_weight: float = 0.0
    """Weight of predicting HOG features (edge directions; Wei et al. 2022) in addition to pixels; 0 for none."""
    decoder_width: int = 512
    """Embedding dimension of the decoder."""
    decoder_depth: int = 8
    """Number of blocks in the decoder."""
    decoder_heads: int = 16
    """Number of attention heads in the decoder."""
    decoder_mlp_ratio: float | None = None
    """Ratio of the decoder's hidden MLP width to its width; null for encoder.mlp_ratio, as in the paper's code."""

    def __post_init__(self) -> None:
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"task.mask_ratio: {self.mask_ratio} must be in (0, 1) (the paper's is 0.75).")
        check_bounds(self, "task.", "positive", "decoder_width", "decoder_depth", "decoder_heads", "decoder_mlp_ratio")
        if not 0 <= self.hog_weight < math.inf:
            raise ValueError(f"task.hog_weight: {self.hog_weight} must be a number from 0 up (1 is usual).")
        if self.decoder_width % 4:
            raise ValueError(f"task.decoder_width: positions need a multiple of 4, not {self.decoder_width}.")
        if self.decoder_width % self.decoder_heads:
            raise ValueError(
                f"task.decoder_heads: {self.decoder_heads} heads do not divide decoder width {self.decoder_width}."
            )


@dataclass
@checked("task.")
class DINOSettings(TaskSettings):
    """Train a student to match the outputs of a teacher, its own moving average, on other crops (Caron et al. 2021).

    Settings that are null are chosen for the data set and the batch size, and printed at the start (docs/dino.md).
    """

    # 300 epochs, or the number of images in 100 epochs of ImageNet (the two lengths in the released code)
    usual: ClassVar[Usual] = Usual(batch=256, epochs=300, images=1.28e8, base_lr=5e-4)
    name: Literal["dino"] = "dino"
    """Name of the task."""
    out_dim: int | None = None
    """Number of prototypes, the output dimension of the heads; null for one per 20 images, from 256 to 65,536."""
    head_layers: int = 3
    """Number of linear layers in the head's MLP."""
    head_width: int = 2048
    """Hidden width of the head's MLP."""
    bottleneck: int = 256
    """Output width of the head's MLP, before the last layer."""
    batch_norm: bool = False
    """Use batch normalization in the head's MLP."""
    norm_last_layer: bool = True
    """Keep the norm of each prototype at one; false learns the norms (better for small models with a suitable
    temperature, but less stable).
    """
    student_temp: float = 0.1
    """Temperature of the student's softmax."""
    teacher_temp: float | None = None
    """Temperature of the teacher's softmax after its warm-up; lower is sharper. null for 0.07 at global batch sizes
    from 1024 on, otherwise 0.04.
    """
    warmup_teacher_temp: float = 0.04
    """Temperature of the teacher's softmax at the start of its warm-up."""
    warmup_teacher_temp_epochs: float | None = None
    """Epochs in which the teacher's temperature moves linearly to teacher_temp; null for a tenth of the run, at most
    30.
    """
    momentum: float | None = None
    """Momentum of the teacher's moving average at the first update; null for 0.996 at a batch size of 1024, the same
    averaging per image at other batch sizes, and an average over at most a tenth of the run.
    """
    final_momentum: float = 1.0
    """Momentum of the teacher's moving average at the end of the run, reached along half a cosine."""
    centering: Literal["mean", "sinkhorn"] = "mean"
    """Method to keep the teacher from collapsing to one output: mean (subtract a moving average) or sinkhorn
    (Sinkhorn-Knopp: use all prototypes equally in every batch; DINOv2).
    """
    center_momentum: float = 0.9
    """Momentum of the moving average that is subtracted as the center; 1 for no centering."""
    sinkhorn_iterations: int = 3
    """Number of iterations of Sinkhorn-Knopp."""
    koleo: float = 0.0
    """Weight of the KoLeo term, which spreads the student's features over the sphere (DINOv2 uses 0.1)."""
    freeze_last_layer: float = 1
    """Epochs in which the student's last layer is frozen; at most a quarter of the run."""

    def __post_init__(self) -> None:
        counts = ("out_dim", "head_layers", "head_width", "bottleneck", "sinkhorn_iterations")
        check_bounds(self, "task.", "1 or more", *counts)
        check_bounds(self, "task.", "positive", "student_temp", "teacher_temp", "warmup_teacher_temp")
        check_bounds(self, "task.", "in [0, 1]", "momentum", "final_momentum", "center_momentum")
        check_bounds(self, "task.", "0 or more", "warmup_teacher_temp_epochs", "koleo", "freeze_last_layer")
        if self.momentum is not None and self.momentum > self.final_momentum:
            raise ValueError(
                f"task.final_momentum: {self.final_momentum} is below task.momentum ({self.momentum}), but it rises."
            )
        if self.out_dim == 1:
            raise ValueError("task.out_dim: with 1 prototype there is nothing to tell apart. Use 2 or more.")

    def fitted(self, images: int, global_batch_size: int, total_steps: int, classes: int | None = None) -> DINOSettings:
        """Replace every null by a value that suits the job."""
        epochs = total_steps * global_batch_size / images
        fitting: dict[str, Any] = {
            "out_dim": prototypes_for(images),
            "teacher_temp": 0.07 if global_batch_size >= PAPER_BATCH else 0.04,
            "warmup_teacher_temp_epochs": min(30.0, epochs / 10),
            "momentum": momentum_for(global_batch_size, total_steps),
        }
        return replace(self, **{key: value for key, value in fitting.items() if getattr(self, key) is None})

    def check_micro_batch(self, micro: int) -> None:
        """Raise ValueError if KoLeo has no second image."""
        if micro < 2 and self.koleo:
            raise ValueError(
                f"task.koleo: {self.koleo:g} spreads the images of one micro-batch, and a single one has no neighbor. "
                "Raise train.micro_batch_size or data.global_batch_size, or set task.koleo to 0."
            )

    def suggestion(self, symptom: str, lr: str) -> str:
        """Suggest a setting to change if the teacher's output is uniform or always the same prototype."""
        return self._sharpen(lr) if symptom == "even" else self._center(lr)

    def _sharpen(self, lr: str) -> str:
        hottest = max(("teacher_temp", "warmup_teacher_temp"), key=lambda key: getattr(self, key))
        value = getattr(self, hottest)
        temperature = f"task.{hottest} ({value:g})"
        if value >= self.student_temp:
            return f"Set {temperature} well below task.student_temp ({self.student_temp:g}): 0.04 to 0.07 is usual."
        if value > 0.07:
            return f"Lower {temperature}; 0.04 to 0.07 is usual."
        norm = "" if self.batch_norm else "; for small data or batches set task.batch_norm to true"
        return f"Lower {lr} or {temperature}{norm}; or try another task.out_dim ({self.out_dim})."

    def _center(self, lr: str) -> str:
        if self.centering == "mean" and self.center_momentum > 0.99:
            return f"The center hardly moves: lower task.center_momentum ({self.center_momentum:g}); 0.9 is usual."
        temperature = f"task.teacher_temp ({self.teacher_temp:g})"
        remedies = [f"Lower {lr}, or raise data.global_batch_size or {temperature}"]
        if not self.batch_norm:
            remedies.append("for small data set task.batch_norm to true")
        if self.centering == "mean":
            remedies.append("task.centering: sinkhorn keeps all prototypes in use")
        return "; ".join(remedies) + "."


def prototypes_for(images: int) -> int:
    """The power of two nearest to one prototype per 20 images, from 256 to 65,536.

    The paper uses 65,536 for ImageNet. With 1,024, its kNN accuracy is only 2 points lower, so the number is not
    critical.
    """
    return 2 ** min(max(round(math.log2(max(images, 1) / IMAGES_PER_PROTOTYPE)), 8), 16)


def momentum_for(global_batch_size: int, total_steps: int) -> float:
    """The initial momentum of the teacher.

    This is the paper's 0.996 at a batch size of 1024, and an average over as many images at other sizes (Busbridge et
    al. 2023, "How to scale your EMA"). The average covers at most a tenth of the run, which matters in short runs: on
    the digits, two fifths were worse than a tenth or a fortieth (docs/dino.md).
    """
    per_batch = PAPER_MOMENTUM ** (global_batch_size / PAPER_BATCH)
    per_run = 1 - min(MIN_AVERAGES_PER_RUN / total_steps, 0.5)
    return round(min(per_batch, per_run), 6)


@dataclass
@checked("task.")
class IGPTSettings(TaskSettings):
    """Predict the palette colors of pixels (Chen et al. 2020)."""

    # the paper's million steps of 128 images; the learning rate of igpt/small_cifar10
    usual: ClassVar[Usual] = Usual(batch=128, epochs=100, images=1.28e8, base_lr=2e-3)
    name: Literal["igpt"] = "igpt"
    """Name of the task."""
    objective: Literal["autoregressive", "bert"] = "autoregressive"
    """Objective: autoregressive (each pixel from those before it, row by row) or bert (masked pixels from the others;
    needs encoder.causal false and encoder.mask_token true).
    """
    mask_ratio: float = 0.15
    """Fraction of pixels that the bert objective masks."""

    def __post_init__(self) -> None:
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"task.mask_ratio: {self.mask_ratio} must be in (0, 1) (the paper's is 0.15).")


@dataclass
@checked("task.")
class SupervisedSettings(TaskSettings):
    """Train all weights, with a linear head on the pooled tokens. Defaults: those of MAE's released code for ViT-B."""

    name: Literal["supervised"] = "supervised"
    """Name of the task."""
    classes: int | None = None
    """Number of classes; null for that of the shards."""
    val: str | None = None
    """Labeled validation shards, which are never used to choose anything."""
    allow_same_data: bool = False
    """Allow validation on the training images, although the scores then say nothing about other images."""
    validate_every: int | None = None
    """Steps between two validations, rounded up to lines of metrics.jsonl; null for the last step only, whose accuracy
    is the reported one.
    """
    smoothing: float = 0.1
    """Label smoothing (Szegedy et al. 2016)."""
    mixup: float = 0.8
    """Alpha of mixup (Zhang et al. 2018); 0 for none."""
    cutmix: float = 1.0
    """Alpha of CutMix (Yun et al. 2019); 0 for none. If both are given, each batch uses one of them at random."""
    erase: float = 0.25
    """Probability of random erasing: a random box is filled with noise (Zhong et al. 2020)."""

    def __post_init__(self) -> None:
        self.val = self.val and expand_path(self.val)
        check_bounds(self, "task.", "2 or more", "classes")
        check_bounds(self, "task.", "1 or more", "validate_every")
        check_bounds(self, "task.", "in [0, 1)", "smoothing")  # 1 would leave nothing of the labels
        check_bounds(self, "task.", "in [0, 1]", "erase")
        check_bounds(self, "task.", "0 or more", "mixup", "cutmix")

    def check_micro_batch(self, micro: int) -> None:
        """Raise ValueError if there is no second image to mix with."""
        if micro < 2 and (self.mixup or self.cutmix):
            raise ValueError(
                "task.mixup and task.cutmix mix images of one micro-batch: 1 is too few. Raise it, or set them to 0."
            )

    def fitted(
        self, images: int, global_batch_size: int, total_steps: int, classes: int | None = None
    ) -> SupervisedSettings:
        """Set the number of classes to that of the data; ValueError if labels are missing or the numbers differ."""
        if classes is None:
            raise ValueError(
                "--train: supervised training needs labels, and these images have none. Pack them from one folder per "
                "class, or from a list with a column label: sslvit shards pack LIST.csv SHARDS"
            )
        if classes < 2:
            raise ValueError("--train: all images are of one class, so there is nothing to learn. Give two or more.")
        if self.classes is not None and self.classes != classes:
            raise ValueError(f"task.classes: {self.classes}, but the data has {classes}. Leave it out.")
        return replace(self, classes=classes)
