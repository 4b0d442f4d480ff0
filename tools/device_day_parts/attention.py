"""Attention forward and backward, kernel by kernel, at the shapes of the recipes; DINO's crops packed into one call."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from device_day_parts.common import Day, last_line, median_seconds

# name -> images, heads, tokens, width of a head, causal
SHAPES = {
    "MAE-L/16 encoder, a quarter of the patches": (256, 16, 50, 64, False),
    "MAE-L/16 decoder": (256, 16, 197, 32, False),
    "DINO-S/16, 224 pixels": (256, 6, 197, 64, False),
    "DINO-S/16, 96 pixels": (1024, 6, 37, 64, False),
    "iGPT-M, 32 x 32": (16, 8, 1024, 128, True),
}
BACKENDS = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "math": "MATH"}


def run_part(day: Day) -> None:
    for name, (images, heads, tokens, width, causal) in SHAPES.items():
        images, tokens = day.pick((images, tokens), (2, min(tokens, 50)))
        query, key, value, gradient = (random(day, images, heads, tokens, width) for _ in range(4))
        found: dict[str, Any] = {}
        for kind, member in {**BACKENDS, "default": None}.items():

            def attend(causal: bool = causal, q: Any = query, k: Any = key, v: Any = value) -> torch.Tensor:
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

            try:
                with sdpa_kernel(getattr(SDPBackend, member)) if member else nullcontext():
                    found[kind] = 1000 * both_ways(day, attend, [query, key, value], gradient)
            except RuntimeError as error:
                found[kind] = None
                found.setdefault("errors", {})[kind] = last_line(error)[:160]
        day.record(shape=name, size=[images, heads, tokens, width], causal=causal, milliseconds=found)
    packed_crops(day)


def random(day: Day, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=day.device, dtype=torch.bfloat16, requires_grad=True)


def both_ways(
    day: Day, attend: Callable[[], torch.Tensor], inputs: list[torch.Tensor], gradient: torch.Tensor
) -> float:
    """Seconds of a forward and backward pass."""
    return median_seconds(day, lambda: torch.autograd.grad(attend(), inputs, gradient), 0.15)


def packed_crops(day: Day) -> None:
    """DINO-S's 2 crops of 224 and 8 of 96 pixels: one call per size against one call for all."""
    images, heads, width = day.pick(64, 1), 6, 64
    lengths = [197] * 2 * images + [37] * 8 * images
    name = "DINO-S/16, 2 x 224 and 8 x 96 pixels"

    def by_size() -> float:
        total = 0.0
        for length in (197, 37):
            count = lengths.count(length)
            q, k, v, gradient = (random(day, count, heads, length, width) for _ in range(4))
            total += both_ways(day, lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v), [q, k, v], gradient)
        return total

    def packed() -> float:
        from torch.nn.attention.varlen import varlen_attn

        ends = torch.tensor([0, *lengths], device=day.device).cumsum(0).to(torch.int32)
        q, k, v, gradient = (random(day, sum(lengths), heads, width) for _ in range(4))
        attend = lambda: varlen_attn(q, k, v, ends, ends, max(lengths), max(lengths))  # noqa: E731
        return both_ways(day, attend, [q, k, v], gradient)

    found: dict[str, Any] = {}
    for way, seconds in (("by size", by_size), ("packed", packed)):
        try:
            found[way] = 1000 * seconds()
        except Exception as error:  # torch without varlen_attn, or a device without its kernel
            found[way] = None
            found.setdefault("errors", {})[way] = last_line(error)[:160]
    day.record(shape=name, images=images, milliseconds=found)
