"""Commands for pixel models: sampling and likelihood."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from sslvit.commands.files import foreign_overrides, only, report
from sslvit.commands.options import Output, Released, Reported, Saved
from sslvit.files import check_new, check_new_picture
from sslvit.settings.choices import Arg, check_bounds
from sslvit.settings.probe import Device, ForwardPasses, UnreadableImages
from sslvit.settings.sample import SampleSettings

if TYPE_CHECKING:
    from sslvit.models.igpt import IGPTModel


@dataclass(kw_only=True)
class PixelModel(Released):
    """A pixel model."""

    run: Annotated[str, Arg("RUN", position=1)]
    """Run folder or checkpoint of an iGPT run, or a released file."""
    device: Device = "auto"
    """Device of the model; auto is a GPU if there is one."""


@dataclass(kw_only=True)
class SampleOptions(Reported, PixelModel, SampleSettings):
    """Sample images from a pixel model, or complete given ones.

    Example: sslvit sample runs/igpt --complete shards/val --given 0.5
    """

    complete: Annotated[str | None, Arg("IMAGES")] = None
    """Shards or a folder of images to complete."""
    given: float | None = None
    """Fraction of each image to keep, from the top; null for 0.5."""
    draws: int | None = None
    """Completions of each image; null for 3."""
    count: int | None = None
    """Number of images; null for 16, or 8 to complete."""
    output: Annotated[str | None, Output] = None
    """PNG file; null for one in RUN/figures."""


def run_sample(options: SampleOptions) -> None:
    """Sample or complete images, and print the picture's path."""
    check_bounds(options, "--", "1 or more", "count", "draws")
    out = options.output and Path(options.output)
    if not out:
        if not Path(options.run).exists():
            raise FileNotFoundError(f"{options.run}: no such file or folder. Give the folder of an iGPT run.")
        if not Path(options.run).is_dir():
            raise ValueError(f"{options.run}: not a run folder, so say where the picture goes: -o FILE.png")
        out = Path(options.run) / "figures" / ("completions.png" if options.complete else "samples.png")
    if out.parent.exists() or options.output:
        check_new_picture(out)
    else:
        check_new(out.parent)  # which will be made
    if not options.complete and (options.draws, options.given) != (None, None):
        raise ValueError("--draws and --given are for --complete IMAGES.")
    from sslvit.pixel_models import sample

    made = sample(
        load_task(options), complete=options.complete, given=options.given, draws=options.draws, count=options.count,
        device=options.device, **vars(only(SampleSettings, options)),
    )  # fmt: skip
    made.save(out)
    report(options, str(made), made.to_dict())


@dataclass(kw_only=True)
class LikelihoodOptions(Saved, PixelModel, ForwardPasses, UnreadableImages):
    """Measure nats per pixel of an iGPT run, next to n-gram baselines.

    Example: sslvit likelihood runs/igpt --train shards/train --val shards/val
    """

    train: Annotated[str, Arg("SHARDS")]
    """Images on which the baselines count colors."""
    val: Annotated[str, Arg("SHARDS")]
    """Images to score."""
    batch: int = 16


def run_likelihood(options: LikelihoodOptions) -> None:
    """Measure nats per pixel, and print the table."""
    check_new(options.output)
    from sslvit.pixel_models import likelihood

    table = likelihood(
        load_task(options), options.train, options.val, batch=options.batch, device=options.device,
        max_unreadable_fraction=options.max_unreadable_fraction,
    )  # fmt: skip
    report(options, f"\n{table}", table.to_dict())


def load_task(options: PixelModel) -> IGPTModel:
    """Load an iGPT model with its output layer onto the requested device."""
    from sslvit.environment import pick_device
    from sslvit.tasks.released import load_igpt

    return load_igpt(options.run, options.heads, **foreign_overrides(options)).to(pick_device(options.device))
