"""DINO's crops: one forward pass per resolution, as in training, against one pass over all crops packed together.

In the packed pass, the tokens of all crops form one matrix for the linear layers and norms; attention runs per
resolution. Both give the same results. Prints the ratio of their times for a forward and backward pass, measured in
alternation.

    python tools/benchmarks/crops.py dino/vit_small_in1k_100 --batch 2
    python tools/benchmarks/crops.py dino/vit_small_in1k_100 --batch 64 --device cuda --bf16
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from sslvit.data.views import Views
from sslvit.models import ViTEncoder
from sslvit.models.dino import embed_views, runs_of_one_size
from sslvit.settings.load import load_recipe


def packed_views(encoder: ViTEncoder, views: list[Tensor]) -> Tensor:
    """`embed_views` in one pass; only for plain encoders with a class token."""
    groups = [encoder.embed(torch.cat(views[start:stop]))[0] for start, stop in runs_of_one_size(views)]
    shapes = [group.shape[:2] for group in groups]
    counts = [images * tokens for images, tokens in shapes]
    x = torch.cat([group.flatten(0, 1) for group in groups])
    for block in encoder.blocks:
        mixed = []
        for part, (images, _) in zip(block.attn.qkv(block.norm1(x)).split(counts), shapes, strict=True):
            query, key, value = rearrange(
                part, "(b t) (three heads e) -> three b heads t e", b=images, three=3, heads=block.attn.heads
            )
            mixed.append(rearrange(F.scaled_dot_product_attention(query, key, value), "b heads t e -> (b t) (heads e)"))
        x = x + block.attn.proj(torch.cat(mixed))
        x = x + block.mlp(block.norm2(x))
    parts = zip(encoder.norm(x).split(counts), shapes, strict=True)
    first = torch.cat([part.view(images, tokens, -1)[:, 0] for part, (images, tokens) in parts])
    return rearrange(first, "(v b) d -> v b d", b=len(views[0]))


def seconds(way: Callable[[], Tensor], device: str) -> float:
    """Duration of one forward and backward pass."""
    start = time.perf_counter()
    way().square().mean().backward()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--times", type=int, default=10)
    options = parser.parse_args()
    recipe = load_recipe(options.recipe, {"encoder.drop_path": 0.0})
    plain = {
        "layer_scale": None, "qk_norm": False, "locality_self_attention": False, "causal": False, "dropout": 0.0,
        "pooling": "class",
    }  # fmt: skip
    other = [key for key, value in plain.items() if getattr(recipe.encoder, key) != value]
    if other or recipe.encoder.pos_embed in ("rotary_2d", "rotary_2d_normalized", "relative_bias"):
        parser.error(f"{options.recipe}: packing is written for plain encoders ({', '.join(other) or 'positions'}).")
    encoder = ViTEncoder(recipe.encoder).to(options.device)
    sizes = [size for size, _ in Views(recipe.data.view, recipe.encoder.image_size, "bicubic").specs()]
    views = [torch.randn(options.batch, recipe.encoder.channels, *size, device=options.device) for size in sizes]
    ways = {"by resolution": lambda: embed_views(encoder, views), "packed": lambda: packed_views(encoder, views)}
    with torch.autocast(options.device, torch.bfloat16, enabled=options.bf16):
        difference = (ways["by resolution"]() - ways["packed"]()).abs().max()
        for way in ways.values():
            seconds(way, options.device)  # warm
        times = [[seconds(way, options.device) for way in ways.values()] for _ in range(options.times)]
    medians = [statistics.median(column) for column in zip(*times, strict=True)]
    for name, median in zip(ways, medians, strict=True):
        print(f"{name:<14} {1000 * median:9.1f} ms")
    print(
        f"packed is {statistics.median(a / b for a, b in times):.2f} times as fast; largest difference {difference:.1e}"
    )


if __name__ == "__main__":
    main()
