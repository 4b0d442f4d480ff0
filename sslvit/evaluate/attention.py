"""Attention maps and distances, receptive fields, and principal components of patches."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from sslvit.models import ViTEncoder
from sslvit.progress import track


@torch.no_grad()
def class_attention(encoder: ViTEncoder, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b heads rows cols"]:
    """Attention weights of the class token to each patch in the last block, per head (DINO, figure 1).

    Raises:
        ValueError: the encoder has no class token.
    """
    if not encoder.settings.class_token:
        raise ValueError("attention of the class token: this encoder has none (encoder.class_token: false).")
    rows_of_class = []
    for image in track(images, "attention maps", len(images)):  # one by one: only one row of the 't t' weights is kept
        (last,) = encoder.intermediates(image[None], [len(encoder.blocks)], attention=True)
        assert last.attention is not None
        rows_of_class.append(last.attention[:, :, 0, encoder.prefix :])
    weights = torch.cat(rows_of_class)
    rows, columns = encoder.settings.grid_of(*images.shape[2:])
    return rearrange(weights, "b heads (rows cols) -> b heads rows cols", rows=rows, cols=columns)


def mass_mask(attention: Float[Tensor, "b heads rows cols"], mass: float = 0.6) -> Bool[Tensor, "b heads rows cols"]:
    """The smallest set of patches that holds a fraction of each head's attention (DINO, figure 4: 60 %)."""
    flat = attention.flatten(2)
    flat = flat / flat.sum(2, keepdim=True)
    ordered, order = flat.sort(2, descending=True)
    is_kept = ordered.cumsum(2) - ordered < mass  # up to and including the patch that reaches it
    return torch.zeros_like(is_kept).scatter(2, order, is_kept).view(attention.shape)


@torch.no_grad()
def patch_colors(encoder: ViTEncoder, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 rows cols"]:
    """The first three principal components of all images' patch tokens as red, green and blue, each from 0 to 1.

    As in DINOv2 (Oquab et al. 2024, figure 1): patches of one color have similar features, also across images.
    """
    tokens = encoder(images)[:, encoder.prefix :]  # b n d
    rows, columns = encoder.settings.grid_of(*images.shape[2:])
    centered = (tokens - tokens.mean((0, 1))).flatten(0, 1).double()
    _, _, axes = torch.linalg.svd(centered, full_matrices=False)
    axes = axes[:3] * axes[:3].sum(1, keepdim=True).sign()  # the sign of a component is arbitrary: fix it
    components = centered @ axes.T  # (b n) 3
    low, high = (components.quantile(level, dim=0) for level in (0.02, 0.98))
    colors = ((components - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).float()
    return rearrange(colors, "(b rows cols) color -> b color rows cols", rows=rows, cols=columns)


@torch.no_grad()
def patch_similarity(
    encoder: ViTEncoder, images: Float[Tensor, "b c h w"], row: int, column: int
) -> Float[Tensor, "b rows cols"]:
    """Cosine similarity of one patch's token, after the final norm, to those of all patches of the same image.

    Raises:
        ValueError: There is no such patch.
    """
    rows, columns = encoder.settings.grid_of(*images.shape[2:])
    if not (0 <= row < rows and 0 <= column < columns):
        raise ValueError(
            f"--patch {row},{column}: images have {rows} x {columns} patches, from 0,0 to {rows - 1},{columns - 1}."
        )
    tokens = F.normalize(encoder(images)[:, encoder.prefix :].float(), dim=2)
    similarity = torch.einsum("bnd,bd->bn", tokens, tokens[:, row * columns + column])
    return rearrange(similarity, "b (rows cols) -> b rows cols", rows=rows)


@torch.no_grad()
def attention_measures(
    encoder: ViTEncoder, images: Float[Tensor, "b c h w"]
) -> tuple[Float[Tensor, "layers heads"], Float[Tensor, "layers heads"]]:
    """Mean attention distance of each head, in pixels of the image, and its entropy, in nats.

    The distance is that between patch centers, weighted by the attention from patch to patch (ViT, Dosovitskiy et al.
    2021, figure 7); the entropy is that of a token's whole attention row. Both are means over tokens and images.
    """
    rows, columns = encoder.settings.grid_of(*images.shape[2:])
    grid = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), 2).flatten(0, 1)
    pixels = torch.cdist(grid.double(), grid.double()).to(images) * encoder.settings.patch  # n n
    distances, entropies = [], []
    for block in encoder.intermediates(images, range(1, len(encoder.blocks) + 1), attention=True):
        assert block.attention is not None
        weights = block.attention.float()  # b heads t t
        entropies.append(-torch.xlogy(weights, weights).sum(3).mean((0, 2)))
        between = weights[:, :, encoder.prefix :, encoder.prefix :]
        between = between / between.sum(3, keepdim=True).clamp(min=1e-12)
        distances.append((between * pixels).sum(3).mean((0, 2)))
    return torch.stack(distances).cpu(), torch.stack(entropies).cpu()


def receptive_field(
    features: Callable[[Float[Tensor, "b c h w"]], Float[Tensor, "b d"]],
    images: Float[Tensor, "b c h w"],
    seed: int = 0,
) -> Float[Tensor, "h w"]:
    """Influence of each pixel on a feature, from 0 to 1: the mean size of its gradient (Luo et al. 2016).

    `features` maps images to the features at one position of a network; the gradient is that of a random direction in
    their space, one per image.
    """
    images = images.clone().requires_grad_()
    with torch.enable_grad():
        found = features(images)
        direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(seed), device="cpu").to(found)
        (gradient,) = torch.autograd.grad((found * direction).sum(), images)
    field = gradient.abs().sum(1).mean(0)
    return (field / field.max().clamp(min=1e-30)).detach().cpu()
