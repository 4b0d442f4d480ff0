"""Training with labels: fine-tuning of a pretrained encoder, and the same from scratch as its baseline.

MAE's fine-tuning (He et al. 2022, appendix A.1): AdamW with rates that fall from the head to the patches, stochastic
depth, RandAugment (in the view), mixup, CutMix, random erasing, label smoothing, a linear head on the pooled tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.transforms import v2

from sslvit import rng
from sslvit.data.batch import Batch
from sslvit.models import ViTEncoder
from sslvit.optim import layer_decay_groups
from sslvit.settings import EncoderSettings, OptimSettings, SupervisedSettings
from sslvit.tasks.base import Task
from sslvit.tasks.start import begin_with

NOT_COMPARED = ("image_size", "final_norm", "fc_norm", "mask_token", "pooling")  # a fine-tuned encoder may differ here
ENDS = ("norm.", "fc_norm.", "attn_pool.")  # of the encoder, that may be new
HEAD_STD = 2e-5


class Supervised(Task):
    """An encoder and a linear head.

    Args:
        settings: see SupervisedSettings; `classes` must be known.
        encoder: that is trained; its `pooling` and `fc_norm` make the head's input.
        optim: how weights move.
        run: see Task.
    """

    view_kinds = ("augment", "crop", "square", "center", "canvas")

    def __init__(
        self, settings: SupervisedSettings, encoder: EncoderSettings, optim: OptimSettings, **run: int
    ) -> None:
        super().__init__(settings, encoder, optim, **run)
        if settings.classes is None:
            raise ValueError("task.classes: still null. Call SupervisedSettings.fitted first.")
        self.head = nn.Linear(encoder.width, settings.classes)
        nn.init.trunc_normal_(self.head.weight, std=HEAD_STD)
        nn.init.zeros_(self.head.bias)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, target = self.mix(self.erase(batch), batch)  # b c h w, b classes
        tokens = self.encoder(images, path_noise=self.path_noise(batch))  # b t d
        pooled = self.encoder.pool(tokens)  # b d
        logits = self.head(pooled)  # b classes
        loss = F.cross_entropy(logits.float(), target, label_smoothing=self.settings.smoothing)
        self.record("loss", loss)
        self.watch(pooled)
        return loss

    def logits(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        """What it takes images for; in evaluation mode."""
        return self.head(self.encoder.pool(self.encoder(images)))

    # ---- chance ----------------------------------------------------------------------------------------------

    def erase(self, batch: Batch) -> Float[Tensor, "b c h w"]:
        """A box of some images filled with noise; drawn by seed, epoch and sample."""
        (images,) = batch.views
        if not self.settings.erase:
            return images
        is_erased = self.uniform("erase", batch, 1)[:, 0] < self.settings.erase
        images = images.clone()
        eraser = v2.RandomErasing(p=1.0, value="random")
        for row in torch.nonzero(is_erased)[:, 0].tolist():
            with rng.torch_seeded(self.seed, "erase", int(batch.epochs[row]), int(batch.samples[row])):
                images[row] = eraser(images[row])
        return images

    def mix(self, images: Tensor, batch: Batch) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b classes"]]:
        """Each image with its neighbor, by one share for the micro-batch, drawn by seed, step and its place in it."""
        settings = self.settings
        makers = [
            kind(alpha=alpha, num_classes=settings.classes)
            for kind, alpha in ((v2.MixUp, settings.mixup), (v2.CutMix, settings.cutmix))
            if alpha
        ]
        if not makers:
            return images, F.one_hot(batch.labels, settings.classes).to(images.dtype)
        with rng.torch_seeded(self.seed, "mix", self.global_step, batch.first_row):
            images, target = v2.RandomChoice(makers)(images, batch.labels)
        return images, target.to(images.dtype)

    def extra_weights(self) -> dict[str, Tensor]:
        return {f"head.{key}": value for key, value in self.head.state_dict().items()}

    # ---- weights ---------------------------------------------------------------------------------------------

    def parameter_groups(self) -> list[dict]:
        named = [(name.removeprefix("encoder."), parameter) for name, parameter in self.named_parameters()]
        depth = self.encoder.settings.depth
        return layer_decay_groups(named, depth, self.optim.weight_decay, self.settings.layer_decay)

    def start_from(self, start: ViTEncoder, source: str) -> None:
        """Begin with a pretrained encoder, its positions stretched to this size; what is behind the blocks may be new.

        Raises:
            ValueError: it is of another architecture, or cannot be stretched.
        """
        begin_with(self.encoder, start, source, NOT_COMPARED, ENDS)
