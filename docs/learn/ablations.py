"""Deliberately broken models, which show what a component is for.

Each function changes a built model and returns it. No setting or recipe produces such a model, and its weights do not
reveal the change: do not save one under the name of an intact model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslvit.models.encoder import ViTEncoder
from sslvit.models.igpt import IGPTModel
from sslvit.models.tokens import gather_tokens


class IdentityAttention(nn.Module):
    """Attention with the identity matrix as its weights: each token gets its own value and nothing from the others."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, tokens: Float[Tensor, "b t d"], layout: Any = None, kv_cache: Any = None) -> Tensor:
        """Apply the value and output projections of the replaced attention."""
        value = self.attention.heads_of(tokens, layout)[2]
        return self.attention.proj(rearrange(value, "b heads t e -> b t (heads e)"))


class PermutedTokens(nn.Module):
    """A tokenizer that returns its tokens in a fixed order other than that of the patches."""

    order: Int[Tensor, "n"]

    def __init__(self, tokenizer: nn.Module, order: Sequence[int]) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.register_buffer("order", torch.as_tensor(order), persistent=False)

    def forward(self, images: Float[Tensor, "b c h w"], visible: Int[Tensor, "b k"] | None = None) -> Tensor:
        """The tokens of the visible patches, after the permutation."""
        return gather_tokens(self.tokenizer(images)[:, self.order], visible)


def remove_attention(encoder: ViTEncoder) -> ViTEncoder:
    """Replace every block's attention by the identity, so that tokens cannot interact; returns the encoder."""
    for number in range(1, len(encoder.blocks) + 1):
        encoder.block(number).attn = IdentityAttention(encoder.block(number).attn)  # type: ignore[assignment]
    return encoder


def permute_patches(encoder: ViTEncoder, order: Sequence[int]) -> ViTEncoder:
    """Move patch order[i] to position i, before positions are added; returns the encoder.

    Raises:
        ValueError: The order is not a permutation of the patches of the encoder's grid.
    """
    rows, columns = encoder.settings.grid
    if sorted(int(number) for number in order) != list(range(rows * columns)):
        raise ValueError(f"order: must name each of the {rows * columns} patches once.")
    encoder.patch_embed = PermutedTokens(encoder.patch_embed, order)
    return encoder


def remove_shift(model: IGPTModel) -> IGPTModel:
    """Let each position of an autoregressive model see the pixel that it predicts; returns the model.

    Its loss falls to zero, since the input contains the answer, and its samples are nonsense.
    """
    model.encoder.pixel_tokens.shifted = False
    return model
