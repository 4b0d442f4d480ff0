"""SimMIM (Xie et al. 2022) as a custom task: replace patches by a mask token, and predict their pixels linearly.

sslvit pretrain --config mae/digits --data shards/train --out runs/simmim --plugin docs/examples/simmim.py \
    --task.name simmim:SimMIM --encoder.mask_token true
"""

from dataclasses import dataclass

from torch import Tensor, nn

from sslvit.data.batch import Batch
from sslvit.models import ViTEncoder
from sslvit.models.igpt import random_mask
from sslvit.models.mae import patchify
from sslvit.settings import EncoderSettings, TaskSettings
from sslvit.tasks.base import StepOutput, Task


@dataclass
class SimMIMSettings(TaskSettings):
    """Keys below `task` in a recipe."""

    name: str = "simmim:SimMIM"
    mask_ratio: float = 0.6
    """Fraction of patches that are hidden."""


class SimMIMModel(nn.Module):
    """An encoder over all positions, with a mask token for hidden patches, and a linear map to pixels."""

    def __init__(self, settings: SimMIMSettings, encoder: EncoderSettings) -> None:
        super().__init__()
        self.encoder = ViTEncoder(encoder)
        self.head = nn.Linear(encoder.width, encoder.patch**2 * encoder.channels)
        self.num_hidden = round(settings.mask_ratio * encoder.grid[0] * encoder.grid[1])

    def loss(self, images: Tensor, noise: Tensor, path_noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean absolute error of the hidden pixels, and the tokens 'b n d'."""
        settings = self.encoder.settings
        is_hidden = random_mask(noise, self.num_hidden)  # b n
        tokens = self.encoder(images, hidden=is_hidden, path_noise=path_noise)[:, settings.prefix :]  # b n d
        error = (self.head(tokens) - patchify(images, settings.patch)).abs().mean(2)  # b n
        return (error * is_hidden).sum() / is_hidden.sum(), tokens


class SimMIM(Task):
    """The Lightning module, which draws a step's random numbers and records its loss."""

    settings_class = SimMIMSettings

    def make_model(self, encoder: EncoderSettings) -> SimMIMModel:
        return SimMIMModel(self.settings, encoder)

    def compute(self, batch: Batch, step: int) -> StepOutput:
        images = batch.views[0]  # b c h w
        rows, columns = self.encoder.settings.grid_of(*images.shape[2:])
        noise = self.uniform("mask", batch, rows * columns, step)  # b n
        loss, tokens = self.loss_fn(images, noise, self.path_noise(batch, step))
        return StepOutput(loss, {"loss": loss}, tokens.mean(1))

    def unused_modules(self) -> tuple[str, ...]:
        return ("fc_norm",)  # nothing is pooled
