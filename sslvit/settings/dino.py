"""Self-distillation with no labels (Caron et al. 2021)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from sslvit.settings.choices import check_bounds, checked
from sslvit.settings.task import TaskSettings, Usual

IMAGES_PER_PROTOTYPE = 20  # ImageNet's 1.28 M images for 65,536 outputs (Caron et al. 2021, section 3.2)
PAPER_BATCH, PAPER_MOMENTUM = 1024, 0.996  # section 3.2, "Implementation details"
PARTS_OF_A_RUN = 10  # the teacher averages over at most one of them


@dataclass
@checked("task.")
class DINOSettings(TaskSettings):
    """A student learns to name crops as its own average, the teacher, names them.

    Keys that are null are chosen for the data set and the batch, and printed at the start (docs/dino.md).
    """

    # 300 epochs, or as many images as 100 epochs of ImageNet have (the released code's two lengths)
    usual: ClassVar[Usual] = Usual(batch=256, epochs=300, images=1.28e8, base_lr=5e-4)
    name: Literal["dino"] = "dino"
    """Name of the task."""
    out_dim: int | None = None
    """Number of prototypes, the output dimension of the heads; null for one per 20 images, from 256 to 65,536."""
    head_layers: int = 3
    """Linear layers in the head's MLP."""
    head_width: int = 2048
    """Hidden width of the head's MLP."""
    bottleneck: int = 256
    """Output width of the head's MLP, before the last layer."""
    batch_norm: bool = False
    """Use batch normalization in the head's MLP."""
    norm_last_layer: bool = True
    """Keep the norm of each prototype at one; false learns the norms (better for a small model with a fitting
    temperature, less stable).
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
    """Epochs in which the teacher's temperature moves linearly to teacher_temp; null for 30, or a tenth of a shorter
    run.
    """
    momentum: float | None = None
    """Momentum of the teacher's moving average at the first update; null for 0.996 at a batch size of 1024, as strong
    per image at others, and an average over at most a tenth of the run.
    """
    final_momentum: float = 1.0
    """Momentum of the teacher's moving average at the last update."""
    centering: Literal["mean", "sinkhorn"] = "mean"
    """What keeps the teacher from one output for all images: mean (subtract a moving average) or sinkhorn
    (Sinkhorn-Knopp: use all prototypes equally in every batch; DINOv2).
    """
    center_momentum: float = 0.9
    """Momentum of the moving average that is subtracted as the center; 1 for no centering."""
    sinkhorn_iterations: int = 3
    """Iterations of Sinkhorn-Knopp."""
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
        """The same with every null replaced by what suits the job."""
        epochs = total_steps * global_batch_size / images
        fitting: dict[str, Any] = {
            "out_dim": prototypes_for(images),
            "teacher_temp": 0.07 if global_batch_size >= PAPER_BATCH else 0.04,
            "warmup_teacher_temp_epochs": min(30.0, epochs / 10),
            "momentum": momentum_for(global_batch_size, total_steps),
        }
        return replace(self, **{key: value for key, value in fitting.items() if getattr(self, key) is None})

    def check_micro_batch(self, micro: int) -> None:
        """Raise ValueError where KoLeo has no second image."""
        if micro < 2 and self.koleo:
            raise ValueError(
                f"task.koleo: {self.koleo:g} spreads the images of one micro-batch, and a single one has no neighbor. "
                "Raise train.micro_batch_size or data.global_batch_size, or set task.koleo to 0."
            )

    def remedy(self, sign: str, rate: str) -> str:
        """The knob for a teacher that is too even, or that has one prototype for all."""
        return self._sharpen(rate) if sign == "even" else self._center(rate)

    def _sharpen(self, rate: str) -> str:
        hottest = max(("teacher_temp", "warmup_teacher_temp"), key=lambda key: getattr(self, key))
        value = getattr(self, hottest)
        temperature = f"task.{hottest} ({value:g})"
        if value >= self.student_temp:
            return f"Set {temperature} well below task.student_temp ({self.student_temp:g}): 0.04 to 0.07 is usual."
        if value > 0.07:
            return f"Lower {temperature}; 0.04 to 0.07 is usual."
        norm = "" if self.batch_norm else "; for small data or batches set task.batch_norm to true"
        return f"Lower {rate} or {temperature}{norm}; or try another task.out_dim ({self.out_dim})."

    def _center(self, rate: str) -> str:
        if self.centering == "mean" and self.center_momentum > 0.99:
            return f"The center hardly moves: lower task.center_momentum ({self.center_momentum:g}); 0.9 is usual."
        temperature = f"task.teacher_temp ({self.teacher_temp:g})"
        parts = [f"Lower {rate}, or raise data.global_batch_size or {temperature}"]
        if not self.batch_norm:
            parts.append("for small data set task.batch_norm to true")
        if self.centering == "mean":
            parts.append("task.centering: sinkhorn keeps all prototypes in use")
        return "; ".join(parts) + "."


def prototypes_for(images: int) -> int:
    """The power of two nearest to one prototype per 20 images, from 256 to 65,536.

    The paper's 65,536 for ImageNet; it found 1,024 to be 2 points of kNN worse there, so the number is not delicate.
    """
    return 2 ** min(max(round(math.log2(max(images, 1) / IMAGES_PER_PROTOTYPE)), 8), 16)


def momentum_for(global_batch_size: int, total_steps: int) -> float:
    """The teacher's first momentum.

    The paper's 0.996 at a batch of 1024; an average over as many images at others (Busbridge et al. 2023, "How to
    scale your EMA"); but over no more than a tenth of the run, which matters in short runs: on the digits two fifths
    of it were worse than a tenth or a fortieth (docs/dino.md).
    """
    per_batch = PAPER_MOMENTUM ** (global_batch_size / PAPER_BATCH)
    per_run = 1 - min(PARTS_OF_A_RUN / total_steps, 0.5)
    return round(min(per_batch, per_run), 6)
