"""Color jitter, grayscale, blur and solarization, batched, on any device (DINO, section 3.1).

What happens to an image is drawn by key, once. Brightness, contrast and saturation commute with each other, so of
their random order with the hue only one thing matters: which of them come before it. An image is therefore mapped
once before its hue turns (in HSV, exactly as in PIL) and once after it. Against PIL's chain of steps one thing
differs: values are rounded at the end and cut to 0..255 twice, not after each step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sslvit import rng
from sslvit.settings.views import MultiCropSettings

Tap = TypeVar("Tap", float, Tensor)
GRAY = (0.299, 0.587, 0.114)  # ITU-R 601-2, as in PIL
COLUMNS = ("brightness", "contrast", "saturation", "hue", "order", "is_gray", "sigma", "is_solarized")
ORDERS = list(itertools.permutations(range(4)))
HUE = COLUMNS.index("hue")
SOLARIZE_THRESHOLD = 128
TRUNCATE = 3  # standard deviations at which a blur's kernel ends
PIXELS_AT_ONCE = 50_000  # on a CPU: what is worked on stays in its cache


def sample_colors(settings: MultiCropSettings, view: int, key: tuple[int, int], samples: np.ndarray) -> np.ndarray:
    """What happens to the colors of one view of each sample: float32 'b columns', columns as in COLUMNS.

    Args:
        settings: probabilities and ranges.
        view: 0 and 1 for the global crops, then the local ones.
        key: seed and epoch.
        samples: their numbers.
    """
    # the spelling is part of the key: another one would be other random numbers
    uniform = rng.uniform((*key, f"colour {view}"), samples, 10)
    kind = min(view, 2)  # first global crop, second one, local crops
    is_changed = uniform[:, 0] < settings.jitter
    strengths = np.array([settings.brightness, settings.contrast, settings.saturation])
    factors = np.where(is_changed[:, None], 1 + (2 * uniform[:, 1:4] - 1) * strengths, 1.0)
    hue = np.where(is_changed, (2 * uniform[:, 4] - 1) * settings.hue, 0.0)
    order = np.floor(uniform[:, 5] * len(ORDERS))
    is_gray = uniform[:, 6] < settings.gray
    sigma = np.where(uniform[:, 7] < settings.blur[kind], np.interp(uniform[:, 8], [0, 1], settings.blur_sigma), 0.0)
    is_solarized = uniform[:, 9] < settings.solarize[kind]
    return np.stack([*factors.T, hue, order, is_gray, sigma, is_solarized], 1).astype(np.float32)


def color_jitter(images: Tensor, draws: Tensor) -> Tensor:
    """Apply sampled color changes.

    Args:
        images: pixels 0 to 255 of any dtype, 'b c h w'; hue, saturation and grayness need three channels.
        draws: Result of sample_colors, on the images' device.

    Returns:
        float32 'b c h w', 0 to 255; whole numbers if the images' were.
    """
    if images.device.type != "cpu":
        return _change(images, draws)
    at_once = max(1, PIXELS_AT_ONCE // (images.shape[2] * images.shape[3]))
    pieces = zip(images.split(at_once), draws.split(at_once), strict=True)
    return torch.cat([_change(piece, rows) for piece, rows in pieces])


def _change(images: Tensor, draws: Tensor) -> Tensor:
    b, c, h, w = images.shape
    pixels = images.to(torch.float32, copy=True).reshape(b, c, h * w)
    hue = draws[:, HUE]
    rank = torch.tensor(ORDERS, device=images.device).argsort(1)[draws[:, 4].long()]  # b steps: the position of each
    is_before = rank[:, :HUE] < rank[:, HUE:]  # brightness, contrast, saturation
    factors = draws[:, :HUE]
    if c == 3:
        turned = hue.nonzero()[:, 0]
        if len(turned):
            some = pixels if len(turned) == b else pixels[turned]
            _scale_in_place(some, torch.where(is_before, factors, 1.0)[turned])
            _turn_hue_in_place(some.clamp_(0, 255), hue[turned])
            if some is not pixels:
                pixels[turned] = some
            factors = torch.where(is_before & (hue != 0)[:, None], 1.0, factors)
        _scale_in_place(pixels, factors, draws[:, 5])
    else:
        _scale_in_place(pixels, factors)
    pixels = pixels.clamp_(0, 255).view(b, c, h, w)
    _blur_in_place(pixels, draws[:, 6])
    if not images.is_floating_point():
        pixels.round_()
    is_solarized = draws[:, 7].nonzero()[:, 0]
    if len(is_solarized):
        bright = pixels[is_solarized]
        pixels[is_solarized] = torch.where(bright >= SOLARIZE_THRESHOLD, 255 - bright, bright)
    return pixels


def _scale_in_place(pixels: Tensor, factors: Tensor, is_gray: Tensor | None = None) -> None:
    """Brightness, contrast (around the image's mean gray) and saturation at once, then perhaps grayscale.

    Args:
        pixels: 'b c n'.
        factors: Factors of the three, 'b 3'.
        is_gray: 1 where color goes, 'b'.
    """
    brightness, contrast, saturation = (factors[:, i, None] for i in range(3))
    if pixels.shape[1] == 3:
        gray = (pixels[:, 0] * GRAY[0]).add_(pixels[:, 1], alpha=GRAY[1]).add_(pixels[:, 2], alpha=GRAY[2])  # b n
        if is_gray is not None:
            saturation = saturation * (1 - is_gray[:, None])
    else:
        gray, saturation = pixels.mean(1), torch.ones_like(saturation)
    middle = brightness * (1 - contrast) * gray.mean(1, keepdim=True)
    scale = brightness * contrast
    pixels.mul_((scale * saturation)[:, None]).add_(gray.mul_(scale * (1 - saturation)).add_(middle)[:, None])


def _turn_hue_in_place(pixels: Tensor, hue: Tensor) -> None:
    """Turn the hue of HSV, which leaves each pixel's largest and smallest value as they are.

    Args:
        pixels: 'b 3 n', 0 to 255.
        hue: turn as a fraction of the circle, 'b'.
    """
    red, green, blue = pixels.unbind(1)
    largest = torch.maximum(torch.maximum(red, green), blue)
    span = largest - torch.minimum(torch.minimum(red, green), blue)
    # 0 where the channel is the largest, otherwise 1; comparisons and torch.where take ten times as long
    not_red, not_green = ((largest - channel).mul_(1e6).clamp_(max=1) for channel in (red, green))
    # the hue as a fraction of the circle from red over green to blue, turned
    turned = torch.lerp(green - blue, torch.lerp(blue - red, red - green, not_green), not_red)
    turned.div_(span.clamp(min=1e-6).mul_(6))
    turned.add_(not_green.add_(1).mul_(not_red).div_(3)).add_(hue[:, None])
    for channel, opposite in enumerate((1 / 2, 5 / 6, 1 / 6)):  # where a channel is at its smallest: a sixth each side
        distance = turned - opposite
        distance.sub_(distance.round()).abs_()  # on the circle
        below = distance.mul_(-6).add_(2).clamp_(0, 1)
        torch.addcmul(largest, span, below, value=-1, out=pixels[:, channel])


def _blur_in_place(images: Tensor, sigma: Tensor) -> None:
    """Gaussian blur of the rows whose deviation is not zero; a separable kernel, mirrored at the border."""
    blurred = sigma.nonzero()[:, 0]
    if not len(blurred):
        return
    max_radius = min(images.shape[2:]) - 1  # a mirror image has no more
    if images.device.type == "cpu":  # one by one: no more taps than each needs, and plain numbers are faster
        for i in blurred.tolist():
            weights: list[float] = _kernel(sigma[i : i + 1], max_radius)[0].tolist()
            images[i : i + 1] = _blur(
                images[i : i + 1], weights, lambda total, shifted, tap: total.add_(shifted, alpha=tap)
            )
    else:
        taps = list(_kernel(sigma[blurred], max_radius)[:, :, None, None, None].unbind(1))  # each b 1 1 1
        images[blurred] = _blur(images[blurred], taps, Tensor.addcmul_)


def _kernel(sigma: Tensor, max_radius: int) -> Tensor:
    """Weights 'b taps' that sum to one; beyond TRUNCATE deviations of a row they are zero."""
    radius = min(max(1, math.ceil(TRUNCATE * float(sigma.max()))), max_radius)
    offset = torch.arange(-radius, radius + 1, device=sigma.device)
    weights = torch.exp(-0.5 * (offset / sigma[:, None]) ** 2)
    weights *= offset.abs() <= torch.ceil(TRUNCATE * sigma[:, None]).clamp(min=1)
    return weights / weights.sum(1, keepdim=True)


def _blur(images: Tensor, taps: list[Tap], add_weighted: Callable[[Tensor, Tensor, Tap], Tensor]) -> Tensor:
    radius = len(taps) // 2
    for axis, padding in ((3, (radius, radius, 0, 0)), (2, (0, 0, radius, radius))):
        padded = F.pad(images, padding, mode="reflect")
        length = images.shape[axis]
        images = padded.narrow(axis, 0, length) * taps[0]
        for offset, tap in enumerate(taps[1:], 1):
            add_weighted(images, padded.narrow(axis, offset, length), tap)
    return images
