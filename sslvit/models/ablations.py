"""Models that are broken on purpose, to show what a part is for (docs/learn) and to test what finds it missing.

Each function changes a built model and returns it. No setting and no recipe makes such a model, and none of them can be
told from its weights: do not save one under the name of a sound model.
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
    """Attention whose weights are the identity matrix: each token takes its own value, and nothing of the others."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, tokens: Float[Tensor, "b t d"], layout: Any = None, kv_cache: Any = None) -> Tensor:
        """Values and output map of the attention that it replaces."""
        value = self.attention.heads_of(tokens, layout)[2]
        return self.attention.proj(rearrange(value, "b heads t e -> b t (heads e)"))


class PermutedTokens(nn.Module):
    """A tokenizer whose tokens come in a fixed order that is not that of the patches."""

    order: Int[Tensor, "n"]

    def __init__(self, tokenizer: nn.Module, order: Sequence[int]) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.register_buffer("order", torch.as_tensor(order), persistent=False)

    def forward(self, images: Float[Tensor, "b c h w"], visible: Int[Tensor, "b k"] | None = None) -> Tensor:
        """The tokens of the visible places, each place taken by another patch."""
        return gather_tokens(self.tokenizer(images)[:, self.order], visible)


def remove_attention(encoder: ViTEncoder) -> ViTEncoder:
    """Replace every block's attention by the identity, so that no token learns of another; returns the encoder."""
    for number in range(1, len(encoder.blocks) + 1):
        encoder.block(number).attn = IdentityAttention(encoder.block(number).attn)  # type: ignore[assignment]
    return encoder


def permute_patches(encoder: ViTEncoder, order: Sequence[int]) -> ViTEncoder:
    """Let patch order[i] take place i, before positions are added; returns the encoder.

    Raises:
        ValueError: The order does not name every patch of the encoder's own grid once.
    """
    rows, columns = encoder.settings.grid
    if sorted(int(number) for number in order) != list(range(rows * columns)):
        raise ValueError(f"order: must name each of the {rows * columns} patches once.")
    encoder.patch_embed = PermutedTokens(encoder.patch_embed, order)
    return encoder


def remove_shift(model: IGPTModel) -> IGPTModel:
    """Let each position of an autoregressive model see the very pixel that it predicts; returns the model.

    Its loss falls to zero, since the answer stands in the input, and what it samples is nonsense.
    """
    model.encoder.pixel_tokens.shifted = False
    return model
