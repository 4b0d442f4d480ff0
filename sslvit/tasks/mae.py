"""MAE, masked autoencoding (He et al. 2022), as a Lightning module; the model and its loss are in models/mae.py."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sslvit import rng
from sslvit.data.batch import Batch
from sslvit.models import Encoder
from sslvit.models.mae import MAELoss, MAEModel
from sslvit.settings import EncoderSettings, MAESettings
from sslvit.tasks.base import StepOutput, Task
from sslvit.tasks.start import begin_decoder
from sslvit.tasks.symptoms import Symptom, trivial_symptoms

FIGURE_IMAGES = 8


class MAE(Task):
    """Reconstruct hidden patches from a few visible ones; arguments as for Task."""

    settings_class: ClassVar = MAESettings
    needs_tokens: ClassVar[str | None] = "MAE encodes the visible patches alone, and a decoder puts the others in"
    settings: MAESettings
    model: MAEModel

    def make_model(self, encoder: EncoderSettings) -> MAEModel:
        """Encoder and decoder."""
        return MAEModel(self.settings, encoder)

    def start_from(self, start: Encoder, source: str) -> None:
        """Start from a trained encoder's weights, and from the decoder beside it if its settings agree.

        Raises:
            ValueError: As in Task.
        """
        super().start_from(start, source)
        begin_decoder(self.model, start.settings, source)

    def compute(self, batch: Batch, step: int) -> StepOutput:
        """The reconstruction error under this step's masks."""
        images = batch.views[0]  # b c h w
        rows, columns = self.model.grid_of(images)
        noise = self.uniform("mask", batch, rows * columns, step)  # b n
        found: MAELoss = self.loss_fn(images, noise, self.path_noise(batch, step))
        references = {"target_moments": self.model.target_moments(images, noise)} if self.logs_features else {}
        return StepOutput(found.loss, {"loss": found.loss}, found.features, references=references)

    def symptoms(self, measures: dict[str, float]) -> list[Symptom]:
        """A decoder that predicts the mean patch, or features of low rank."""
        return trivial_symptoms(measures, "target_variance", "predicting the mean patch everywhere", self.optim)

    def unused_modules(self) -> tuple[str, ...]:
        """MAE does not pool, and it uses the decoder's mask token."""
        return ("mask_token", "fc_norm")

    def figures(self, batch: Batch) -> dict[str, tuple[list[str], list[np.ndarray]]]:
        """reconstruction: the input, the input with hidden patches gray, and the reconstruction."""
        return {"reconstruction": reconstruction_rows(self.model, batch.views[0][:FIGURE_IMAGES], self.run.seed)}


@torch.no_grad()
def reconstruction_rows(
    model: MAEModel, images: Float[Tensor, "b c h w"], seed: int = 0
) -> tuple[list[str], list[np.ndarray]]:
    """Titles and rows of a figure: the input, the input with hidden patches gray, and the reconstruction."""
    rows, columns = model.grid_of(images)
    noise = rng.uniform((seed, 0, "figure"), np.arange(len(images)), rows * columns)
    filled, is_hidden = model.reconstruct(images, torch.from_numpy(noise).to(images.device))
    pixels, filled = (model.encoder.to_display(one) for one in (images, filled))
    masked = pixels * (1 - is_hidden) + 0.5 * is_hidden
    titles = ["input", "what the\nencoder sees", "reconstruction"]
    return titles, [row.float().cpu().numpy() for row in (pixels, masked, filled)]
