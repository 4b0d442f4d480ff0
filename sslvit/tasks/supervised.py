"""Training with labels: fine-tuning of a pretrained encoder, and training from scratch as its baseline.

MAE's fine-tuning (He et al. 2022, appendix A.1; random erasing only in the released code): AdamW with layer-wise
learning rate decay, stochastic depth, RandAugment (in the view), mixup, CutMix, random erasing, label smoothing, and a
linear head on the pooled tokens.
"""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torchvision.transforms import v2

from sslvit import rng
from sslvit.data.batch import Batch
from sslvit.data.packed import Packed
from sslvit.models import Encoder
from sslvit.models.classifier import Classifier, ClassifierLoss
from sslvit.optim.groups import TOKENS
from sslvit.settings import EncoderSettings, SupervisedSettings, TaskSettings
from sslvit.tasks.base import StepOutput, Task
from sslvit.tasks.start import adaptable, begin_with
from sslvit.tasks.symptoms import STUCK_FRACTION, Symptom, feature_symptoms, lr_in_words

NOT_COMPARED = ("final_norm", "fc_norm", "mask_token", "pooling")  # settings that fine-tuning may change
ENDS = ("norm.", "fc_norm.", "attn_pool.")  # prefixes of the encoder's weights that may be new


class Supervised(Task):
    """An encoder and a linear head; arguments as for Task, with `task.classes` set."""

    settings_class: ClassVar = SupervisedSettings
    spared_from_decay: ClassVar = TOKENS
    view_kinds: ClassVar[tuple[str, ...]] = ("augment", "crop", "square", "center", "canvas")
    needs_tokens: ClassVar[str | None] = None
    settings: SupervisedSettings
    model: Classifier

    def resolve(self, settings: TaskSettings) -> TaskSettings:
        """Return the settings unchanged: the number of classes comes from the data set."""
        assert isinstance(settings, SupervisedSettings)
        if settings.classes is None:
            raise ValueError("task.classes: still null. Call SupervisedSettings.fitted first.")
        return settings

    def make_model(self, encoder: EncoderSettings) -> Classifier:
        """Encoder and head."""
        return Classifier(encoder, self.classes)

    @property
    def classes(self) -> int:
        """Number of classes."""
        assert self.settings.classes is not None
        return self.settings.classes

    def compute(self, batch: Batch, step: int) -> StepOutput:
        """The cross-entropy of erased and mixed images; in evaluation mode of unchanged ones, with the accuracy."""
        if self.training:
            images, target = self.mix(self.erase(batch, step), batch, step)  # b c h w, b classes
        else:
            images, target = batch.views[0], self.one_hot(batch, batch.views[0])
        found: ClassifierLoss = self.loss_fn(images, target, self.settings.smoothing, self.path_noise(batch, step))
        metrics = {"loss": found.loss}
        if not self.training:
            metrics["top1"] = 100 * torch.eq(found.logits.argmax(1), target.argmax(1)).float().mean()
        return StepOutput(found.loss, metrics, found.features)

    def predict_step(self, batch: Batch, batch_idx: int = 0) -> Float[Tensor, "b classes"]:
        """Logits of a batch's images, for `Trainer.predict`."""
        return self.model(batch.views[0])

    def symptoms(self, measures: dict[str, float]) -> list[Symptom]:
        """A loss that means equal probabilities for all classes, or features of low rank."""
        loss, even = measures["loss"], math.log(self.classes)
        if abs(loss - even) < STUCK_FRACTION * even:
            seen = f"the loss sits at ln {self.classes} = {even:.3f}: every class is as likely as any other"
            suggestion = f"Change {lr_in_words(self.optim)}: lower it, or raise it if it is far below a recipe's."
            return [Symptom("stuck", seen, suggestion)]
        return feature_symptoms(measures, self.optim)

    # ---- mixing and erasing ----------------------------------------------------------------------------------

    def erase(self, batch: Batch, step: int) -> Float[Tensor, "b c h w"]:
        """Random erasing: a box in some images is filled with noise, seeded by seed, epoch and sample."""
        (images,) = batch.views
        if not self.settings.erase:
            return images
        rows = batch.first_row + np.arange(len(batch))
        is_erased = rng.uniform((self.run.seed, step, "erase"), rows, 1)[:, 0] < self.settings.erase
        (rows,) = np.nonzero(is_erased)
        # noise is drawn on the CPU, and sent to the device in one piece
        noise = torch.full((len(rows), *images.shape[1:]), math.nan, dtype=images.dtype)
        eraser = v2.RandomErasing(p=1.0, value="random")
        for number, row in enumerate(rows):
            with rng.torch_seeded(self.run.seed, "erase", int(batch.epochs[row]), int(batch.samples[row])):
                noise[number] = eraser(noise[number])
        noise, erased = Packed.of([noise, torch.from_numpy(rows)]).send(images.device).tensors()
        images = images.clone()
        images[erased] = torch.where(noise.isnan(), images[erased], noise)
        return images

    def mix(
        self, images: Tensor, batch: Batch, step: int
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b classes"]]:
        """Mix each image with its neighbor, in one ratio per micro-batch, seeded by seed, step and first row."""
        makers = [
            kind(alpha=alpha, num_classes=self.classes)
            for kind, alpha in ((v2.MixUp, self.settings.mixup), (v2.CutMix, self.settings.cutmix))
            if alpha
        ]
        target = self.one_hot(batch, images)  # refuses a batch without labels
        if not makers:
            return images, target
        with rng.torch_seeded(self.run.seed, "mix", step, batch.first_row):
            images, target = v2.RandomChoice(makers)(images, batch.labels)
        return images, target.to(images.dtype)

    def one_hot(self, batch: Batch, images: Tensor) -> Float[Tensor, "b classes"]:
        """The labels as probabilities."""
        if batch.labels is None:
            raise ValueError("supervised training needs labels, and this batch has none.")
        return F.one_hot(batch.labels, self.classes).to(images.dtype)

    # ---- weights ---------------------------------------------------------------------------------------------

    def extra_weights(self) -> dict[str, Tensor]:
        """The head's weights."""
        return {f"head.{key}": value for key, value in self.model.head.state_dict().items()}

    def start_from(self, start: Encoder, source: str) -> None:
        """Start from a pretrained encoder, with positions interpolated; parts after the blocks may be new.

        Raises:
            ValueError: The architecture differs, or the positions cannot be interpolated.
        """
        begin_with(self.encoder, start, source, (*adaptable(start.settings), *NOT_COMPARED), ENDS)
