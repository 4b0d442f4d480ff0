"""Changes of colour, batched, on any device: jitter, no colour, blur, solarisation (DINO, section 3.1).

What happens to an image is drawn by key, once; how it is done is one affine map of its colours, because brightness,
contrast, saturation and a turn of the hue all are, in any order. Against PIL's chain of four steps two things
differ: values are cut to 0..255 once at the end instead of after each step, and the hue turns in the YIQ plane
(a rotation of all colours) instead of in HSV. docs/data.md has the measured differences.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sslvit.chance import uniform_at
from sslvit.settings.views import MultiCropSettings

GREY = (0.299, 0.587, 0.114)  # ITU-R 601-2, as in PIL
TO_YIQ = ((0.299, 0.587, 0.114), (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135))
DRAWS = ("brightness", "contrast", "saturation", "hue", "order", "is_grey", "sigma", "is_solarised")
ORDERS = list(itertools.permutations(range(4)))
SOLARISE_FROM = 128
REACH = 3  # a blur's kernel ends at this many deviations


def draw_colours(settings: MultiCropSettings, view: int, key: tuple[int, int], samples: np.ndarray) -> np.ndarray:
    """What happens to the colours of one view of each sample: float32 'b draws', columns as in DRAWS.

    Args:
        settings: probabilities and ranges.
        view: 0 and 1 for the global crops, then the local ones.
        key: seed and epoch.
        samples: their numbers.
    """
    uniform = uniform_at((*key, f"colour {view}"), samples, 10)
    place = min(view, 2)
    is_changed = uniform[:, 0] < settings.jitter
    strengths = np.array([settings.brightness, settings.contrast, settings.saturation])
    factors = np.where(is_changed[:, None], 1 + (2 * uniform[:, 1:4] - 1) * strengths, 1.0)
    hue = np.where(is_changed, (2 * uniform[:, 4] - 1) * settings.hue, 0.0)
    order = np.floor(uniform[:, 5] * len(ORDERS))
    is_grey = uniform[:, 6] < settings.grey
    sigma = np.where(uniform[:, 7] < settings.blur[place], np.interp(uniform[:, 8], [0, 1], settings.blur_sigma), 0.0)
    is_solarised = uniform[:, 9] < settings.solarise[place]
    return np.stack([*factors.T, hue, order, is_grey, sigma, is_solarised], 1).astype(np.float32)


def change_colours(images: Tensor, draws: Tensor) -> Tensor:
    """Apply what was drawn.

    Args:
        images: pixels 0 to 255 of any dtype, 'b c h w'; hue, saturation and greyness need three channels.
        draws: of draw_colours, on the images' device.

    Returns:
        float32 'b c h w', whole numbers 0 to 255.
    """
    b, c, h, w = images.shape
    pixels = images.float().reshape(b, c, h * w)
    matrix, offset = _colour_maps(pixels.mean(2), draws)
    pixels = torch.baddbmm(offset, matrix, pixels).clamp_(0, 255).view(b, c, h, w)
    sigma, is_solarised = draws[:, 6], draws[:, 7].bool()
    _blur_in_place(pixels, sigma)
    pixels.round_()
    return torch.where((is_solarised[:, None, None, None]) & (pixels >= SOLARISE_FROM), 255 - pixels, pixels)


def _colour_maps(mean: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """One affine map per image, 'b c c' and 'b c 1', that stands for all steps in their drawn order.

    Args:
        mean: of each channel 'b c'; contrast is relative to the mean grey of the image as the earlier steps left it.
        draws: of draw_colours.
    """
    b, c = mean.shape
    brightness, contrast, saturation, hue = (draws[:, i, None, None] for i in range(4))
    order = torch.tensor(ORDERS, device=mean.device)[draws[:, 4].long()]  # b steps
    identity = torch.eye(c, device=mean.device).expand(b, c, c)
    grey = torch.tensor(GREY, device=mean.device) if c == 3 else torch.full((c,), 1 / c, device=mean.device)
    to_grey = grey.expand(c, c)
    nothing = torch.zeros(b, c, 1, device=mean.device)
    matrix, offset = identity, nothing
    for step in range(4):
        left = grey @ (matrix @ mean[:, :, None] + offset)  # b 1: mean grey so far
        maps = torch.stack(
            [
                brightness * identity,
                contrast * identity,
                saturation * identity + (1 - saturation) * to_grey if c == 3 else identity,
                _turn(hue) if c == 3 else identity,
            ],
            1,
        )  # b 4 c c
        shifts = torch.stack([nothing, ((1 - contrast) * left[:, :, None]).expand(b, c, 1), nothing, nothing], 1)
        kind = order[:, step]
        chosen = torch.arange(b, device=mean.device)
        now, shift = maps[chosen, kind], shifts[chosen, kind]
        matrix, offset = now @ matrix, now @ offset + shift
    if c == 3:
        is_grey = draws[:, 5, None, None].bool()
        matrix, offset = torch.where(is_grey, to_grey @ matrix, matrix), torch.where(is_grey, to_grey @ offset, offset)
    return matrix, offset


def _turn(hue: Tensor) -> Tensor:
    """Turn all colours around the grey axis: 'b 3 3' from shares of the circle 'b 1 1'."""
    to_yiq = torch.tensor(TO_YIQ, device=hue.device)
    # PIL's hue runs from red over green to blue, the IQ angle the other way
    cosine, sine = torch.cos(-2 * math.pi * hue), torch.sin(-2 * math.pi * hue)
    one, zero = torch.ones_like(hue), torch.zeros_like(hue)
    rows = [torch.cat([one, zero, zero], 2), torch.cat([zero, cosine, -sine], 2), torch.cat([zero, sine, cosine], 2)]
    return torch.linalg.inv(to_yiq) @ torch.cat(rows, 1) @ to_yiq


def _blur_in_place(images: Tensor, sigma: Tensor) -> None:
    """Gaussian blur of the rows whose deviation is not zero; a separable kernel, mirrored at the border."""
    chosen = sigma.nonzero()[:, 0]
    if not len(chosen):
        return
    most = min(images.shape[2:]) - 1  # a mirror image has no more
    if images.device.type == "cpu":  # one by one: each stays in the processor's cache, with no more taps than it needs
        for i in chosen.tolist():
            images[i : i + 1] = _blur(images[i : i + 1], sigma[i : i + 1], min(_reach(float(sigma[i])), most))
    else:
        images[chosen] = _blur(images[chosen], sigma[chosen], min(_reach(float(sigma.max())), most))


def _reach(sigma: float) -> int:
    return max(1, math.ceil(REACH * sigma))


def _blur(images: Tensor, sigma: Tensor, reach: int) -> Tensor:
    place = torch.arange(-reach, reach + 1, device=images.device)
    weights = torch.exp(-0.5 * (place / sigma[:, None]) ** 2)
    weights *= place.abs() <= torch.ceil(REACH * sigma[:, None]).clamp(min=1)
    weights = (weights / weights.sum(1, keepdim=True))[:, :, None, None, None]  # b taps 1 1 1
    for axis, padding in ((3, (reach, reach, 0, 0)), (2, (0, 0, reach, reach))):
        padded = F.pad(images, padding, mode="reflect")
        length = images.shape[axis]
        images = padded.narrow(axis, 0, length) * weights[:, 0]
        for tap in range(1, 2 * reach + 1):
            images.addcmul_(padded.narrow(axis, tap, length), weights[:, tap])
    return images
