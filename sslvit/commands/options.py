"""Options that several commands have. A command's options are a dataclass; its docstring and fields are its help."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from sslvit.settings.choices import Arg
from sslvit.settings.probe import Device, Pooling, check_least, check_unreadable_fraction

Layout = Literal["mae", "dino", "dinov2", "timm", "transformers", "openai_igpt"]
File = Arg("FILE")
Output = Arg("FILE", flag="-o")


@dataclass(kw_only=True)
class Options:
    """Options of every command."""

    quiet: bool = False
    """Say warnings and errors only, and show no progress."""
    traceback: bool = False
    """Show where an error came from."""


@dataclass(kw_only=True)
class Reported(Options):
    """Options of a command whose result is numbers."""

    json: bool = False
    """Print the result as one JSON document, and all messages on stderr."""


@dataclass(kw_only=True)
class Saved(Reported):
    """The same, where the numbers may be kept in a file."""

    output: Annotated[str | None, Output] = None
    """File for the result as JSON."""


@dataclass(kw_only=True)
class Recipe(Options):
    """Options of a command that takes settings of a recipe as --KEY VALUE."""

    changes: Annotated[dict[str, Any], argparse.SUPPRESS] = field(default_factory=dict)


@dataclass(kw_only=True)
class Resumable(Recipe):
    """Options of a command that trains."""

    resume: bool = False
    """Resume from the run folder's last checkpoint."""
    overwrite: bool = False
    """Delete an earlier run in the folder first."""


@dataclass(kw_only=True)
class Released:
    """What a released file does not tell."""

    heads: int | None = None
    """Number of attention heads of a released file, which does not tell it."""
    image_size: Annotated[list[int] | None, Arg(("HEIGHT", "WIDTH"))] = None
    """Image size in pixels that a released file was trained at."""
    palette: Annotated[str | None, File] = None
    """Colors of a released iGPT, which its file does not hold."""


@dataclass(kw_only=True)
class FromFile(Released):
    """How a file of weights is read."""

    layout: Layout | None = None
    """Layout of a released file; null for the one that its names tell."""
    weights: str | None = None
    """Which network of a file with several, such as student or model_ema."""


@dataclass(kw_only=True)
class Encoder(FromFile):
    """An encoder."""

    encoder: Annotated[str, Arg("ENCODER", position=1)]
    """Run folder, encoder folder or checkpoint file."""


@dataclass(kw_only=True)
class CroppedEncoder(Encoder):
    """An encoder that sees images."""

    crop_fraction: float | None = None
    """Fraction of the center crop's sides that is seen, 224 of 256: 0.875; null for the encoder's own."""


@dataclass(kw_only=True)
class Passes:
    """Passes of images through an encoder."""

    layer: int | None = None
    """Number of the block whose output is taken; null for the encoder's own."""
    pooling: Pooling | None = None
    """Pooling of the tokens; null for the encoder's own."""
    max_unreadable_fraction: float = 0.01
    """Fraction of the images that may be unreadable; these are skipped and counted."""
    batch: int = 256
    """Images per forward pass."""
    workers: int = 0
    """Number of loader processes."""
    device: Device = "auto"
    """Device of the encoder; auto is a GPU where there is one."""

    def __post_init__(self) -> None:
        check_least(self, batch=1, workers=0, seed=0, blocks=1)
        check_unreadable_fraction(self.max_unreadable_fraction)
