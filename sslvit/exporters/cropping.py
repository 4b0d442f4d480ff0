"""The crop used in evaluation, for libraries that resize to whole pixels before they crop."""

from __future__ import annotations

from PIL import ImageOps
from PIL.Image import Image, Resampling

from sslvit.settings import EncoderSettings

IMAGE_CHANNELS = (1, 3)  # channels of images that other libraries can read


def resized_sides(settings: EncoderSettings) -> list[int]:
    """Height and width that a library resizes to before the center crop: larger by an even number of pixels.

    With an odd number, the center would lie between two pixels, and libraries would shift the crop by half a pixel.
    """
    return [side + 2 * round((side / settings.crop_fraction - side) / 2) for side in settings.size]


def whole_pixel_fraction(settings: EncoderSettings) -> float:
    """The crop fraction in a library that resizes to whole pixels."""
    return settings.size[0] / resized_sides(settings)[0]


def is_fitted(settings: EncoderSettings) -> bool:
    """Whether images must be cropped and resized before transformers' processor, which does not support this crop."""
    if settings.tokens == "pixel":
        return settings.crop_mode != "squash" or settings.crop_fraction < 1
    return settings.crop_mode != "squash" and settings.size[0] != settings.size[1]


def fit(image: Image, settings: EncoderSettings) -> Image:
    """Crop and resize an image as in evaluation."""
    height, width = settings.size
    cut = (1 - whole_pixel_fraction(settings)) / 2
    resampling = Resampling[settings.interpolation.upper()]
    if settings.crop_mode == "squash":
        box = (cut * image.width, cut * image.height, (1 - cut) * image.width, (1 - cut) * image.height)
        return image.resize((width, height), resampling, box)
    return ImageOps.fit(image, (width, height), resampling, bleed=cut)


def zeros_snippet(settings: EncoderSettings) -> str:
    """A line of Python that stands for a normalized batch of images of which photo.jpg cannot be one."""
    shape = ", ".join(map(str, (1, settings.channels, *settings.size)))
    return f"torch.zeros({shape})  # prepared as below"


def open_snippet(settings: EncoderSettings) -> str:
    """A line of Python that opens a photo, upright and with the encoder's channels."""
    mode = "L" if settings.channels == 1 else "RGB"
    return f'image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("{mode}")'


def array_snippet(settings: EncoderSettings) -> list[str]:
    """Lines of Python that make a batch from a photo, for a program that expects normalized pixels."""
    if settings.channels not in IMAGE_CHANNELS:
        shape = (1, settings.channels, *settings.size)
        return [f"images = np.zeros({shape}, np.float32)  # prepared as below"]
    return [
        open_snippet(settings),
        fit_snippet(settings),
        "pixels = np.atleast_3d(np.asarray(image, np.float32)) / 255",
        f"pixels = (pixels - np.float32({settings.mean!r})) / np.float32({settings.std!r})",
        "images = pixels.transpose(2, 0, 1)[None]",
    ]


def fit_snippet(settings: EncoderSettings) -> str:
    """`fit` as a line of Python."""
    height, width = settings.size
    cut = (1 - whole_pixel_fraction(settings)) / 2
    resampling = f"Image.Resampling.{settings.interpolation.upper()}"
    if settings.crop_mode == "squash":
        w, h = "image.width", "image.height"
        box = f"({cut!r} * {w}, {cut!r} * {h}, {1 - cut!r} * {w}, {1 - cut!r} * {h})"
        return f"image = image.resize(({width}, {height}), {resampling}, {box})"
    bleed = f", bleed={cut!r}" if cut else ""
    return f"image = ImageOps.fit(image, ({width}, {height}), {resampling}{bleed})"
