"""iGPT: "Generative Pretraining from Pixels" (Chen et al. 2020), section 2.

An image is a sequence of palette colors, row by row. Autoregressive: the sequence is shifted right by a start token,
and the output of a causal encoder at position i predicts pixel i, which it has not seen. BERT: some pixels are hidden,
and a bidirectional encoder predicts them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sslvit.models.encoder import ViTEncoder
from sslvit.settings import EncoderSettings, IGPTSettings


def pixel_nll(
    logits: Float[Tensor, "b n colors"],
    colors: Int[Tensor, "b n"],
    is_counted: Bool[Tensor, "b n"] | None = None,
) -> Float[Tensor, ""]:
    """Mean negative log-likelihood of the pixels' colors, in nats per pixel.

    Chen et al. 2020, section 2.1: L_AR and L_BERT, divided by the number of pixels in their sums.

    Args:
        logits: Logits of every color at every position.
        colors: palette index of every pixel.
        is_counted: True where a pixel counts toward the loss; None for all.
    """
    # float32: a bf16 softmax over 512 colors loses its tail
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    error = F.cross_entropy(logits.flatten(0, 1), colors.flatten(), reduction="none").view_as(colors)
    if is_counted is None:
        return error.mean()
    return (error * is_counted).sum() / is_counted.sum()


def random_mask(noise: Float[Tensor, "b n"], hidden: int) -> Bool[Tensor, "b n"]:
    """True for the `hidden` pixels with the lowest noise.

    The paper hides each pixel independently with the same probability; a fixed number per image gives all micro-batches
    equal weight.
    """
    return noise.argsort(dim=1, stable=True).argsort(dim=1, stable=True) < hidden


class IGPTLoss(NamedTuple):
    """The result of one forward pass of an IGPTModel.

    Attributes:
        loss: Nats per predicted pixel.
        features: Mean of the encoder's tokens, 'b d'.
        colors: Palette index of every pixel, 'b n'.
    """

    loss: Tensor
    features: Tensor
    colors: Tensor


class IGPTModel(nn.Module):
    """An encoder of pixels and a linear layer from its tokens to the palette's colors (section 2.2).

    Args:
        settings: The objective.
        encoder: The encoder's architecture and input.

    Raises:
        ValueError: An encoder that does not fit the objective.
    """

    def __init__(self, settings: IGPTSettings, encoder: EncoderSettings) -> None:
        super().__init__()
        check_encoder(settings, encoder)
        self.settings = settings
        self.encoder = ViTEncoder(encoder)
        self.head = nn.Linear(encoder.width, len(self.encoder.pixel_tokens.palette), bias=False)
        nn.init.zeros_(self.head.weight)  # as in the released code: all colors are equally likely at first

    def loss(
        self, images: Float[Tensor, "b c h w"], noise: Float[Tensor, "b n"] | None = None,
        path_noise: Tensor | None = None,
    ) -> IGPTLoss:  # fmt: skip
        """The negative log-likelihood of the predicted pixels.

        Args:
            images: Normalized pixels.
            noise: For the BERT objective, one random number per pixel; the pixels with the lowest are hidden.
            path_noise: Uniform random numbers for stochastic depth, 'branches b'.
        """
        states, colors, is_hidden = self.predict(images, noise, path_noise)
        return IGPTLoss(pixel_nll(self.head(states), colors, is_hidden), states.mean(1), colors)

    def predict(
        self, images: Float[Tensor, "b c h w"], noise: Float[Tensor, "b n"] | None, path_noise: Tensor | None = None
    ) -> tuple[Float[Tensor, "b n d"], Int[Tensor, "b n"], Bool[Tensor, "b n"] | None]:
        """The tokens for predicting pixels, the true colors, and which pixels count toward the loss (None: all)."""
        colors = self.encoder.pixel_tokens.quantize(images)  # b n
        is_hidden = None
        if self.settings.objective == "bert":
            if noise is None:
                raise ValueError("the BERT objective needs noise: one number per pixel.")
            is_hidden = random_mask(noise, num_hidden(self.settings, noise.shape[1]))
        return self.encoder(images, hidden=is_hidden, path_noise=path_noise), colors, is_hidden


def num_hidden(settings: IGPTSettings, pixels: int) -> int:
    """Number of pixels of an image that the BERT objective hides."""
    return round(settings.mask_ratio * pixels)


def check_encoder(settings: IGPTSettings, encoder: EncoderSettings) -> None:
    """Raise ValueError for an encoder that does not fit the objective."""
    if encoder.tokens != "pixel":
        raise ValueError(
            f"iGPT predicts colors of pixels, but this encoder's tokens are {encoder.tokens}. "
            "Set encoder.tokens to pixel (see configs/igpt/)."
        )
    if settings.objective == "autoregressive" and not encoder.causal:
        raise ValueError(
            "iGPT predicts each pixel from earlier ones, but this encoder attends both ways. "
            "Set encoder.causal to true (see configs/igpt/), or task.objective to bert."
        )
    if settings.objective == "bert" and (encoder.causal or not encoder.mask_token):
        raise ValueError(
            "task.objective: bert predicts hidden pixels from all others. "
            "Set encoder.causal to false and encoder.mask_token to true."
        )
    pixels = encoder.grid[0] * encoder.grid[1]
    hidden = num_hidden(settings, pixels)
    if settings.objective == "bert" and not 0 < hidden < pixels:
        raise ValueError(f"task.mask_ratio: {settings.mask_ratio} of {pixels} pixels hides {hidden}. Choose another.")
    if encoder.pooling == "attention":
        raise ValueError(
            "iGPT trains without labels, so an attention pool would stay random. Set encoder.pooling to mean."
        )


def completion_rows(
    encoder: ViTEncoder, colors: Int[Tensor, "b n"], prefix_length: int, completed: list[Int[Tensor, "b n"]]
) -> tuple[list[str], list[np.ndarray]]:
    """Titles and rows of images for input, completions and original."""
    is_seen = (torch.arange(colors.shape[1], device=colors.device) < prefix_length).expand_as(colors)
    titles = ["input", *[f"completion {number + 1}" for number in range(len(completed))], "original"]
    rows = [
        display_colors(encoder, colors, is_seen),
        *(display_colors(encoder, sample) for sample in completed),
        display_colors(encoder, colors),
    ]
    return titles, rows


def display_colors(
    encoder: ViTEncoder, colors: Int[Tensor, "b n"], is_seen: Bool[Tensor, "b n"] | None = None
) -> np.ndarray:
    """Palette indices as images 'b c h w' in [0, 1]; unseen pixels are gray."""
    grid = encoder.settings.grid
    images = encoder.to_display(encoder.pixel_tokens.images_of(colors, grid))
    if is_seen is not None:
        images = torch.where(is_seen.unflatten(1, grid)[:, None], images, torch.full_like(images, 0.5))
    return images.cpu().numpy()
