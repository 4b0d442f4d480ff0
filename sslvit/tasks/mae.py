"""Masked autoencoding as a Lightning module (He et al. 2022); the network and its loss are in models/mae.py."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sslvit import rng
from sslvit.data.batch import Batch
from sslvit.models.mae import MAEModel, masked_patch_mse
from sslvit.settings import EncoderSettings, MAESettings
from sslvit.tasks.base import StepOutput, Task
from sslvit.tasks.symptoms import Symptom, feature_symptoms, trivial_loss

FIGURE_IMAGES = 8


class MAE(Task):
    """Reconstruct hidden patches from a few visible ones; arguments as of Task."""

    settings_class: ClassVar = MAESettings
    settings: MAESettings
    model: MAEModel

    def make_model(self, encoder: EncoderSettings) -> MAEModel:
        """Encoder and decoder."""
        return MAEModel(self.settings, encoder)

    def compute(self, batch: Batch, step: int) -> StepOutput:
        """The reconstruction error under this step's masks."""
        images = batch.views[0]  # b c h w
        rows, columns = self.model.grid_of(images)
        noise = self.uniform("mask", batch, rows * columns, step)  # b n
        latent, visible, is_hidden = self.model.encode(images, noise, self.path_noise(batch, step))  # b t d, b k, b n
        predicted = self.model.decoder(latent, visible, (rows, columns))  # b n pixels
        target = self.model.target(images)  # b n pixels
        loss = masked_patch_mse(predicted, target, is_hidden)
        references = {"target_moments": target_moments(target, is_hidden)} if self.logs_features else {}
        return StepOutput(loss, {"loss": loss}, latent.mean(1), references=references)

    def symptoms(self, measures: dict[str, float]) -> list[Symptom]:
        """A decoder that predicts the mean patch, or features without rank."""
        guess = "predicting the mean patch everywhere"
        return [
            *trivial_loss(measures["loss"], measures["target_variance"], guess, self.optim),
            *feature_symptoms(measures, self.optim),
        ]

    def unused_parts(self) -> tuple[str, ...]:
        """Nothing is pooled, and the decoder's mask token stands for hidden patches."""
        return ("mask_token", "fc_norm")

    def figures(self, batch: Batch) -> dict[str, tuple[list[str], list[np.ndarray]]]:
        """reconstruction: the input, the input with hidden patches gray, and the reconstruction."""
        images = batch.views[0][:FIGURE_IMAGES]
        rows, columns = self.model.grid_of(images)
        noise = rng.uniform((self.run.seed, 0, "figure"), np.arange(len(images)), rows * columns)
        filled, is_hidden = self.model.reconstruct(images, torch.from_numpy(noise).to(images.device))
        pixels, filled = self.encoder.to_display(images), self.encoder.to_display(filled)
        masked = pixels * (1 - is_hidden) + 0.5 * is_hidden
        titles = ["input", "what the\nencoder sees", "reconstruction"]
        pictures = [row.float().cpu().numpy() for row in (pixels, masked, filled)]
        return {"reconstruction": (titles, pictures)}


def target_moments(target: Float[Tensor, "b n p"], is_hidden: Bool[Tensor, "b n"]) -> Float[Tensor, "3 p"]:
    """The mean patch, and over hidden patches the mean and the mean square: the error of guessing that patch."""
    weights = is_hidden[:, :, None].to(target) / is_hidden.sum()  # b n 1
    return torch.stack([target.mean((0, 1)), *((value * weights).sum((0, 1)) for value in (target, target.square()))])
