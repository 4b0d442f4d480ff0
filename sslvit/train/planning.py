"""`sslvit plan`: a forecast of a run on this machine or on a GPU, before it starts."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from sslvit.data.examples import Examples
from sslvit.data.loader import encoder_views
from sslvit.data.open import shard_cache
from sslvit.data.python_data import DataLike, name_of, takes_datasets
from sslvit.environment import cpu_cores, pick_workers
from sslvit.messages import for_python
from sslvit.results import Result
from sslvit.run_plan import RunPlan
from sslvit.settings import IGPTSettings, RunSettings
from sslvit.train.fitting import MicroBatch, choose_micro_batch, cpu_seconds, duration, fit_length
from sslvit.train.forecast import PEAKS, Forecast, forecast, peak_of_gpu, plan_step
from sslvit.train.hardware import cpu_memory, gpu_memory, resolve_processes, trains_on_gpu
from sslvit.train.prepare import check_machine, read_settings, size_notice
from sslvit.train.timed_steps import TimedSteps, fit_budget, time_run, without_scores

LONG_SECONDS = 24 * 3600.0  # a run on a CPU that takes longer is also planned for GPUs
# images that one core decodes and crops per second, if there are none to measure: photographs of 500 x 375 pixels, for
# one view of 224 pixels and for DINO's ten
ASSUMED_ONE_VIEW, ASSUMED_MANY_VIEWS = 500.0, 200.0
STEPS_ON_GPU, STEPS_ON_CPU = 20, 4  # that --measure times
SECONDS_ON_CPU = 2.0  # that each of them may take on a CPU, by the forecast
# pixels per parameter at which next-pixel prediction uses its compute best: 10 to 20 times the 20 tokens of
# language models (Yan et al. 2025, arXiv 2511.08704, figure 1)
BEST_PIXELS = (200, 400)


@dataclass
class Pace:
    """How long a run takes on one kind of hardware.

    Args:
        hardware: Its name.
        basis: How the number was obtained, in words.
        seconds: Length of the run.
        images_per_second: Images trained on in a second, over all ranks.
    """

    hardware: str
    basis: str
    seconds: float
    images_per_second: float


@dataclass
class Loading:
    """Whether the cores of this machine decode images as fast as its devices consume them.

    Args:
        needed: Images per second that one machine's devices consume.
        per_core: Images per second that one core decodes and crops.
        is_measured: Whether this rate was measured on the images, or assumed.
        workers: Loader processes on this machine; 0 if decoding and training take turns.
    """

    needed: float
    per_core: float
    is_measured: bool
    workers: int

    @property
    def delivered(self) -> float:
        """Images per second that all loader processes deliver."""
        return self.per_core * max(self.workers, 1)

    @property
    def is_enough(self) -> bool:
        """Whether the device never waits, or at most a tenth of the time without loader processes."""
        return self.delivered >= (self.needed if self.workers else 10 * self.needed)

    def text(self) -> str:
        """One line for a reader."""
        basis = "measured on these images" if self.is_measured else "assumed, of photographs of 500 x 375 pixels"
        rates = f"{self.needed:,.1f} images/s are needed; a core delivers {self.per_core:,.0f} ({basis})"
        if not self.workers:
            return f"{rates}, in turns with training: {self.needed / (self.needed + self.per_core):.0%} of the time"
        verdict = (
            "enough"
            if self.is_enough
            else ("too few, so the device waits: take more cores, or store the images smaller (shards pack --resize)")
        )
        return f"{rates}, {self.workers} processes {self.delivered:,.0f}: {verdict}"


@dataclass(repr=False)
class PlannedRun(Result):
    """The result of `plan`.

    Args:
        forecast: Parameters, FLOPs and memory of a step, and the run's batches and steps.
        paces: Duration of the run, by hardware; the first one is what the plan is made for.
        loading: The rate that the loader has to deliver; None if the rate of training is unknown.
        micro_batch: The choice of `train.micro_batch_size: auto`; None if the memory is unknown.
        measured: Timings of real steps; None if they were not requested.
        notes: Further notes, by topic.
    """

    forecast: Forecast
    paces: list[Pace]
    loading: Loading | None
    micro_batch: MicroBatch | None
    measured: TimedSteps | None
    notes: dict[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """The plan as text."""
        named = [("micro-batch", self.micro_batch.text())] if self.micro_batch else []
        named += list(self.notes.items())
        named += [("loader", self.loading.text())] if self.loading else []
        named += [("measured", self.measured.text())] if self.measured else []
        named += [("time", f"{duration(pace.seconds)} on {pace.hardware} ({pace.basis})") for pace in self.paces]
        lines = [f"{topic:<12} {text}" for topic, text in named]
        return "\n".join([self.forecast.text(), *lines])

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values."""
        found = self.forecast
        return asdict(found) | {
            "memory": {kind: found.memory(kind) for kind in ("ddp", "fsdp")},
            "hours": {pace.hardware: pace.seconds / 3600 for pace in self.paces},
            "images_per_second": {pace.hardware: pace.images_per_second for pace in self.paces},
            "auto_micro_batch_size": self.micro_batch and self.micro_batch.size,
            "loading": self.loading and asdict(self.loading) | {"is_enough": self.loading.is_enough},
            "measured": self.measured and self.measured.to_dict(),
            "notes": self.notes,
        }  # fmt: skip


@for_python
@takes_datasets("data")
def plan(
    config: str | Path,
    data: DataLike | None = None,
    images: int | None = None,
    classes: int | None = None,
    tflops: float | None = None,
    utilization: float = 0.35,
    memory_gib: float | None = None,
    measure: bool = False,
    **changes: Any,
) -> PlannedRun:
    """Compute parameters, memory, steps and time of a run before it starts, as `sslvit plan` prints them.

    Args:
        config: YAML file, or the name of a recipe such as mae/own_images.
        data: Images as in `pretrain`, which are looked at and not packed; None for the recipe's data.shards.
        images: Number of images, in place of data.
        classes: Number of classes of labeled images, together with a number of images.
        tflops: Peak TFLOP/s of one device in the run's precision; None for this machine's, or those of some GPUs.
        utilization: Assumed fraction of the peak that is used.
        memory_gib: Memory of one GPU in GiB, which the plan is then made for.
        measure: Time some real steps on this machine.
        changes: Other settings, as in `pretrain`.

    Returns:
        The plan; printing it gives the output of the command.

    Raises:
        ValueError: Settings that cannot run, no images to count, or fewer than a batch.
        FileNotFoundError: No data there.

    Example:
        found = sslvit.plan("mae/own_images", data="photos")
        print(found.to_dict()["run"])
    """
    if images is not None and data is not None:
        raise ValueError("--images and --data: give one, a number of images or the images.")
    if images is not None and images < 1:
        raise ValueError(f"--images {images}: must be 1 or more.")
    if images is None and classes is not None:
        raise ValueError("--classes: is for --images. Images themselves tell their classes.")
    if not 0 < utilization <= 1:
        raise ValueError(f"--utilization {utilization:g}: must be in (0, 1].")
    if tflops is not None and not tflops > 0:
        raise ValueError(f"--tflops {tflops:g}: must be positive.")
    if memory_gib is not None and not memory_gib > 0:
        raise ValueError(f"--memory-gib {memory_gib:g}: must be positive.")
    settings = read_settings(config, changes)
    if memory_gib is not None:
        if settings.train.accelerator == "cpu":
            raise ValueError("--memory-gib: the memory of a GPU, but train.accelerator is cpu. Leave one of them out.")
        settings = replace(settings, train=replace(settings.train, accelerator="gpu"))
    settings = replace(settings, train=resolve_processes(settings.train))
    check_machine(settings, is_planned=True)
    if (given := name_of(data)) is not None:
        settings = replace(settings, data=replace(settings.data, shards=given, mixture=None))
    source = settings.data.shards
    if images is None:
        if source is None:
            raise ValueError("--images or --data: how many images are there? Give their number, shards or a folder.")
        examples = Examples.open(source, shard_cache(settings.data))
        classes = examples.classes
        images = settings.data.images_of(examples.images, examples.location, classes)
    else:
        images = settings.data.images_of(images, "--images", classes)
        examples = Examples("", images, classes, [])
        if measure:
            raise ValueError("--measure: real steps take images, not their number. Give shards or a folder.")
    train, on_gpu = settings.train, trains_on_gpu(settings.train)
    if train.threads:
        torch.set_num_threads(train.threads)
    notes: dict[str, str] = {}
    requested_batch = settings.data.global_batch_size
    batch = settings.data.batch_for(images, settings.task.usual.batch, train.batch_multiple)
    measured = None
    if train.budget is not None and train.steps is None:
        if not examples.location or memory_gib is not None:
            raise ValueError(
                "train.budget: steps are timed on images and on this machine. Give shards or a folder and no other "
                "memory, or a length with --train.steps."
            )
        train, measured = fit_budget(settings, images, classes, max(images // batch, 1), batch)
        settings = replace(settings, train=train)
        notes["length"] = f"train.steps {train.steps:,}: {train.budget} at {measured.pace_text()}"
    elif images >= batch:
        train, length = fit_length(settings, images, classes, images // batch, batch)
        settings = replace(settings, train=train)
        if length:
            notes["length"] = f"train.epochs {train.epochs:.4g}: {length}"
    step, chosen = plan_step(settings, images, classes), None
    devices = train.devices or 1
    memory = memory_gib * 2**30 if memory_gib else gpu_memory(devices) if on_gpu else cpu_memory(devices)
    if memory:
        chosen = choose_micro_batch(step, memory)
    found = forecast(step)
    if chosen and train.micro_batch_size == "auto" and (chosen.size is not None or not on_gpu):
        found = chosen.found
    if requested_batch is not None and found.run.global_batch_size != requested_batch:
        notes["batch size"] = f"{batch:,} instead of the recipe's {requested_batch:,} images, more than there are"
    if notice := size_notice(settings, examples.location, examples.size):
        notes["image size"] = notice
    total_images = found.run.global_batch_size * found.run.total_steps
    if notice := model_size_notice(settings, total_images, found.encoder):
        notes["model size"] = notice
    if measure and measured is None:
        measured = _measure(settings, found.run, None if on_gpu else cpu_seconds(step) / total_images)

    paces = []
    if measured:
        rate = measured.images_per_second * found.run.ranks
        where = f"{found.run.ranks} x this machine's {'GPU' if on_gpu else 'CPU'}"
        apart = ", without scores" if measured.seconds_per_score else ""
        paces.append(Pace(where, f"at the measured rate{apart}", total_images / rate, rate))
    elif not on_gpu and tflops is None:
        seconds = cpu_seconds(step)
        basis = f"{cpu_cores()} cores, by its rate of matrix products; --measure times real steps"
        paces.append(Pace("this machine's CPU", basis, seconds, total_images / seconds))
    if not paces or (not on_gpu and paces[0].seconds > LONG_SECONDS):
        here = peak_of_gpu() if on_gpu and memory_gib is None else None
        for name, peak in ({"given": tflops} if tflops else here or PEAKS).items():
            seconds = 3600 * found.hours(peak, utilization)
            basis = f"{peak:g} TFLOP/s, {utilization:.0%} used"
            paces.append(Pace(f"{found.run.ranks} x {name}", basis, seconds, total_images / seconds))
    return PlannedRun(
        found,
        paces,
        loading_of(settings, examples, paces[0].images_per_second, on_gpu),
        chosen,
        measured,
        notes,
    )


def model_size_notice(settings: RunSettings, images: int, parameters: int) -> str | None:
    """A note if a scaling law suggests another size for a model of pixels; None if the size fits, or there is no law.

    Compute grows with pixels times parameters, so at the same cost both change by the square root.

    Args:
        settings: Settings of the run.
        images: Images that the run sees.
        parameters: Parameters of the encoder.
    """
    if not isinstance(settings.task, IGPTSettings) or settings.task.objective != "autoregressive":
        return None
    encoder, sides = settings.encoder, settings.data.fractions_of_sides
    grids = {side: encoder.grid if side is None else encoder.grid_of(side, side) for side in sides}
    pixels = images * sum(fraction * math.prod(grids[side]) for side, fraction in sides.items())
    fewest, most = BEST_PIXELS
    if fewest <= pixels / parameters <= most:
        return None
    best = math.sqrt(pixels * parameters / math.sqrt(fewest * most))
    return (
        f"{pixels / parameters:,.0f} pixels per parameter; {fewest} to {most} make the most of the compute (arXiv "
        f"2511.08704): at the same cost, about {best / 1e6:,.1f} M parameters"
    )


def loading_of(settings: RunSettings, examples: Examples, images_per_second: float, on_gpu: bool) -> Loading:
    """The rate that the loader of each machine has to deliver, and the rate that its cores can deliver."""
    train, encoder = settings.train, settings.encoder
    views = encoder_views(encoder, settings.data.view)
    views.color_here = not on_gpu
    measured = examples.images_per_second(views, encoder.channels, settings.data.memory_limit_mb)
    assumed = ASSUMED_MANY_VIEWS if len(views.specs()) > 1 else ASSUMED_ONE_VIEW
    devices, nodes = train.devices or 1, train.nodes or 1
    is_in_memory = examples.fits_in_memory(encoder.channels, settings.data.memory_limit_mb) and not views.augments
    workers = 0 if is_in_memory else devices * pick_workers(settings.data.workers, "cuda" if on_gpu else "cpu", devices)
    return Loading(images_per_second / nodes, measured or assumed, measured is not None, workers)


def _measure(settings: RunSettings, run: RunPlan, cpu_seconds_per_image: float | None) -> TimedSteps:
    """Time real steps of one forward pass each; on a CPU, of as many images as take a moment by the forecast."""
    batch, steps = run.images_per_pass, STEPS_ON_GPU
    if cpu_seconds_per_image is not None:
        batch, steps = min(batch, max(1, round(SECONDS_ON_CPU / cpu_seconds_per_image))), STEPS_ON_CPU
    return time_run(without_scores(settings), RunPlan(1, 1, batch, seed=settings.seed), steps)
