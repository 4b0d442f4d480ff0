"""iGPT, generative pretraining from pixels (Chen et al. 2020), as a Lightning module; the model is models/igpt.py."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sslvit.data.batch import Batch
from sslvit.models.igpt import IGPTLoss, IGPTModel, completion_rows, display_colors
from sslvit.models.sampling import complete
from sslvit.settings import EncoderSettings, IGPTSettings
from sslvit.settings.sample import SampleSettings
from sslvit.tasks.base import StepOutput, Task
from sslvit.tasks.symptoms import Symptom, trivial_symptoms

COMPLETIONS = 2  # of each image in a run's figures


class IGPT(Task):
    """Predict the palette colors of pixels; arguments as for Task."""

    settings_class: ClassVar = IGPTSettings
    needs_tokens: ClassVar[str | None] = "iGPT predicts each pixel from those before it, one token each"
    settings: IGPTSettings
    model: IGPTModel

    def make_model(self, encoder: EncoderSettings) -> IGPTModel:
        """Encoder and output matrix."""
        return IGPTModel(self.settings, encoder)

    def compute(self, batch: Batch, step: int) -> StepOutput:
        """The negative log-likelihood of the pixels."""
        noise = self.mask_noise(batch, step)
        found: IGPTLoss = self.loss_fn(batch.views[0], noise, self.path_noise(batch, step))
        references: dict[str, Tensor] = {}
        if self.logs_features:
            palette_size = len(self.model.encoder.pixel_tokens.palette)
            references["color_counts"] = torch.bincount(found.colors.flatten(), minlength=palette_size)
        metrics = {"loss": found.loss, "bits": found.loss / math.log(2)}
        return StepOutput(found.loss, metrics, found.features, references=references)

    def mask_noise(self, batch: Batch, step: int) -> Float[Tensor, "b n"] | None:
        """For the BERT objective, one uniform random number per pixel; None if every pixel is predicted."""
        if self.settings.objective == "autoregressive":
            return None
        rows, columns = batch.views[0].shape[2:]
        return self.uniform("mask", batch, rows * columns, step)

    def symptoms(self, measures: dict[str, float]) -> list[Symptom]:
        """A model that has learned nothing but the frequencies of colors, or features of low rank."""
        guess = "guessing each pixel by how frequent colors are"
        return trivial_symptoms(measures, "unigram_entropy", guess, self.optim)

    def unused_modules(self) -> tuple[str, ...]:
        """iGPT does not pool, and only the BERT objective hides pixels."""
        return ("fc_norm",) if self.settings.objective == "bert" else ("fc_norm", "mask_token")

    @torch.no_grad()
    def figures(self, batch: Batch) -> dict[str, tuple[list[str], list[np.ndarray]]]:
        """Unconditional samples and completed lower halves; with the BERT objective, hidden pixels filled in."""
        images, encoder, head = batch.views[0], self.model.encoder, self.model.head
        noise = self.mask_noise(batch, self.global_step)
        if noise is not None:
            states, colors, is_hidden = self.model.predict(images, noise.to(images.device))
            assert is_hidden is not None
            filled = torch.where(is_hidden, head(states).argmax(2), colors)
            pictures = [display_colors(encoder, colors, ~is_hidden)]
            pictures += [display_colors(encoder, one) for one in (filled, colors)]
            return {"filled": (["seen", "filled in", "original"], pictures)}
        colors = encoder.pixel_tokens.quantize(images)  # b n
        settings = SampleSettings(seed=self.run.seed)
        generated = complete(encoder, head, colors[:, :0].repeat(2, 1), settings).chunk(2)
        prefix_length = colors.shape[1] // 2
        upper = colors[:, :prefix_length].repeat(COMPLETIONS, 1)
        completed = complete(encoder, head, upper, settings).chunk(COMPLETIONS)
        rows = completion_rows(encoder, colors, prefix_length, list(completed))
        return {"generated": ([""] * 2, [display_colors(encoder, one) for one in generated]), "completed": rows}
