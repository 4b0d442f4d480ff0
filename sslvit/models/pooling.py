"""Tokens -> one vector per image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from sslvit.models.transformer import Mlp, make_norm
from sslvit.settings import EncoderSettings


class AttentionPool(nn.Module):
    """Attention pooling by a learned query (the MAP head of Zhai et al. 2022; with its MLP if `pool_mlp` is set)."""

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()
        width = settings.width
        self.heads = settings.heads
        self.query = nn.Parameter(torch.zeros(1, 1, width))
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm = make_norm(settings, width) if settings.pool_mlp else None
        self.mlp = Mlp(settings) if settings.pool_mlp else None
        nn.init.trunc_normal_(self.query, std=width**-0.5)

    def forward(self, tokens: Float[Tensor, "b t d"]) -> Float[Tensor, "b d"]:
        """One vector per image."""
        key, value = rearrange(self.kv(tokens), "b t (two heads e) -> two b heads t e", two=2, heads=self.heads)
        query: Tensor = rearrange(self.query, "1 1 (heads e) -> 1 heads 1 e", heads=self.heads)
        query = query.expand(tokens.shape[0], -1, -1, -1).to(key.dtype)
        pooled = F.scaled_dot_product_attention(query, key, value)
        found: Tensor = self.proj(rearrange(pooled, "b heads 1 e -> b 1 (heads e)"))
        if self.norm is not None and self.mlp is not None:
            found = found + self.mlp(self.norm(found))
        return found[:, 0]
