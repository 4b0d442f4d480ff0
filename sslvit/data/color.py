"""Color jitter, grayscale, blur and solarization, batched, on any device (DINO, section 3.2).

The changes of an image are sampled once, from its key. Brightness, contrast and saturation commute with each other, so
their random order only decides which of them come before the hue. An image is therefore transformed once before its
hue is shifted (in HSV, exactly as in PIL) and once after. The only difference from PIL's chain of steps is that values
are rounded once at the end and clipped to 0..255 twice, not after each step.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sslvit import rng
from sslvit.settings.views import MultiCropSettings

GRAY = (0.299, 0.587, 0.114)  # ITU-R 601-2, as in PIL
COLUMNS = ("brightness", "contrast", "saturation", "hue", "order", "is_gray", "sigma", "is_solarized")
ORDERS = list(itertools.permutations(range(4)))
HUE = COLUMNS.index("hue")
# bit masks for brightness, contrast and saturation: bit i is set if the change comes before the hue in ORDERS[i]
BEFORE_HUE = [
    sum(1 << number for number, order in enumerate(ORDERS) if order.index(kind) < order.index(HUE))
    for kind in range(HUE)
]
SOLARIZE_THRESHOLD = 128
TRUNCATE = 3  # radius of the blur kernel in standard deviations
MIN_SIGMA = 1e-3  # for rows without blur, whose kernel is computed all the same
PIXELS_AT_ONCE = 50_000  # on a CPU, so that the working set stays in its cache


def sample_colors(settings: MultiCropSettings, view: int, key: tuple[int, int], samples: np.ndarray) -> np.ndarray:
    """Sample the color changes of one view of each sample: float32 'b columns', with the columns of COLUMNS.

    Args:
        settings: Probabilities and ranges.
        view: 0 and 1 for the global crops, then the local ones.
        key: Seed and epoch.
        samples: Sample numbers.
    """
    # the British spelling is part of the key: changing it would change the random numbers
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
        images: Pixels 0 to 255 of any dtype, 'b c h w'; hue, saturation and grayscale need three channels.
        draws: Result of sample_colors, on the images' device.

    Returns:
        float32 'b c h w', 0 to 255; rounded to whole numbers for images of an integer dtype.
    """
    if images.device.type != "cpu":
        return _change(images, draws)
    at_once = max(1, PIXELS_AT_ONCE // (images.shape[2] * images.shape[3]))
    pieces = zip(images.split(at_once), draws.split(at_once), strict=True)
    return torch.cat([_change(piece, rows) for piece, rows in pieces])


def _change(images: Tensor, draws: Tensor) -> Tensor:
    b, c, h, w = images.shape
    pixels = images.to(torch.float32, copy=True).reshape(b, c, h * w)
    hue, order = draws[:, HUE], draws[:, 4:5].long()
    is_before = (torch.cat([bits >> order for bits in BEFORE_HUE], 1) & 1).bool()  # brightness, contrast, saturation
    factors = draws[:, :HUE]
    if c == 3:
        is_before &= (hue != 0)[:, None]
        turned = _rows(hue)
        if turned is not None:
            some = pixels[turned]
            _scale_in_place(some, torch.where(is_before, factors, 1.0)[turned])
            _turn_hue_in_place(some.clamp_(0, 255), hue[turned])
            if isinstance(turned, Tensor):
                pixels[turned] = some
            factors = torch.where(is_before, 1.0, factors)
        _scale_in_place(pixels, factors, draws[:, 5])
    else:
        _scale_in_place(pixels, factors)
    pixels = pixels.clamp_(0, 255).view(b, c, h, w)
    _blur_in_place(pixels, draws[:, 6])
    if not images.is_floating_point():
        pixels.round_()
    solarized = _rows(draws[:, 7])
    if solarized is not None:
        bright, is_solarized = pixels[solarized], draws[solarized, 7, None, None, None] > 0
        pixels[solarized] = torch.where((bright >= SOLARIZE_THRESHOLD) & is_solarized, 255 - bright, bright)
    return pixels


def _rows(strength: Tensor) -> Tensor | slice | None:
    """The rows that a change applies to: on a CPU the nonzero ones, or None if there are none.

    On other devices all rows, since finding the nonzero ones would wait for the device.
    """
    if strength.device.type != "cpu":
        return slice(None)
    rows = strength.nonzero()[:, 0]
    return None if not len(rows) else slice(None) if len(rows) == len(strength) else rows


def _scale_in_place(pixels: Tensor, factors: Tensor, is_gray: Tensor | None = None) -> None:
    """Change brightness, contrast (around the mean gray value) and saturation at once, then convert to gray.

    Args:
        pixels: 'b c n'.
        factors: Factors of brightness, contrast and saturation, 'b 3'.
        is_gray: 1 for images to convert to gray, 'b'; None for none.
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
    """Shift the hue in HSV, which keeps the largest and smallest channel value of each pixel.

    Args:
        pixels: 'b 3 n', 0 to 255.
        hue: Shift as a fraction of the color circle, 'b'.
    """
    red, green, blue = pixels.unbind(1)
    largest = torch.maximum(torch.maximum(red, green), blue)
    span = largest - torch.minimum(torch.minimum(red, green), blue)
    # 0 where the channel is the largest, otherwise 1; ten times as fast as comparisons and torch.where
    not_red, not_green = ((largest - channel).mul_(1e6).clamp_(max=1) for channel in (red, green))
    # the shifted hue, as a fraction of the circle from red over green to blue
    turned = torch.lerp(green - blue, torch.lerp(blue - red, red - green, not_green), not_red)
    turned.div_(span.clamp(min=1e-6).mul_(6))
    turned.add_(not_green.add_(1).mul_(not_red).div_(3)).add_(hue[:, None])
    for channel, opposite in enumerate((1 / 2, 5 / 6, 1 / 6)):  # hue at which the channel is smallest, +- 1/6
        distance = turned - opposite
        distance.sub_(distance.round()).abs_()  # on the circle
        below = distance.mul_(-6).add_(2).clamp_(0, 1)
        torch.addcmul(largest, span, below, value=-1, out=pixels[:, channel])


def _blur_in_place(images: Tensor, sigma: Tensor) -> None:
    """Gaussian blur of the rows with nonzero sigma; a separable kernel with reflection at the border."""
    max_radius = min(images.shape[2:]) - 1  # reflection padding allows no more
    if images.device.type == "cpu":  # one by one: each with its own kernel size, and Python floats are faster
        for i in sigma.nonzero()[:, 0].tolist():
            images[i : i + 1] = _blur(images[i : i + 1], _kernel(float(sigma[i]), max_radius))
    else:  # all at once, as matrices: reading the kernel sizes would wait for the device
        images.copy_(torch.where(sigma[:, None, None, None] > 0, _blur_by_matrices(images, sigma, max_radius), images))


def _kernel(sigma: float, max_radius: int) -> list[float]:
    """Weights of a Gaussian, cut off at TRUNCATE standard deviations; they sum to one."""
    radius = min(max(1, math.ceil(TRUNCATE * sigma)), max_radius)
    offset = torch.arange(-radius, radius + 1)
    weights = torch.exp(-0.5 * (offset / sigma) ** 2)
    return (weights / weights.sum()).tolist()


def _blur(images: Tensor, taps: list[float]) -> Tensor:
    radius = len(taps) // 2
    for axis, padding in ((3, (radius, radius, 0, 0)), (2, (0, 0, radius, radius))):
        padded = F.pad(images, padding, mode="reflect")
        length = images.shape[axis]
        images = padded.narrow(axis, 0, length) * taps[0]
        for offset, tap in enumerate(taps[1:], 1):
            images.add_(padded.narrow(axis, offset, length), alpha=tap)
    return images


def _blur_by_matrices(images: Tensor, sigma: Tensor, max_radius: int) -> Tensor:
    """`_blur` of each row with its own sigma, as one matrix product per axis."""
    b, c, h, w = images.shape
    rows = _blur_matrices(sigma, h, max_radius)
    columns = rows if h == w else _blur_matrices(sigma, w, max_radius)
    along_columns = torch.bmm(images.reshape(b, c * h, w), columns.transpose(1, 2)).view(b, c, h, w)
    return rows[:, None] @ along_columns


def _blur_matrices(sigma: Tensor, length: int, max_radius: int) -> Tensor:
    """(b, length, length): weight of each input pixel in each blurred pixel, along one axis.

    A pixel counts at three positions: its own, and its reflections at both ends; an end pixel is not reflected there.
    """
    pixel = torch.arange(length, device=sigma.device)
    into, far, last = pixel[:, None], 2 * length + max_radius, length - 1
    distance = torch.stack(
        [
            pixel - into,
            torch.where(pixel > 0, pixel + into, far),
            torch.where(pixel < last, 2 * last - pixel - into, far),
        ]
    ).abs_()  # 3 into pixel
    sigma = sigma.clamp(min=MIN_SIGMA)[:, None, None, None]
    radius = torch.ceil(TRUNCATE * sigma).clamp(1, max_radius)
    weights = (torch.exp(-0.5 * (distance / sigma) ** 2) * (distance <= radius)).sum(1)
    return weights / weights.sum(2, keepdim=True)
