"""Times some real steps before a run, and tells how many steps fit into a given time."""

from __future__ import annotations

import logging
import resource
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from statistics import median
from time import perf_counter
from typing import Any

import pytorch_lightning as pl
import torch

from sslvit.data.module import ShardDataModule
from sslvit.data.open import open_data
from sslvit.progress import track_counter
from sslvit.run_plan import RunPlan
from sslvit.settings import RunSettings, SupervisedSettings
from sslvit.settings.run import TrainSettings, read_duration
from sslvit.stopping import Preempted
from sslvit.tasks import make_task
from sslvit.train.callbacks.base import StepCallback
from sslvit.train.callbacks.scoring import score_interval
from sslvit.train.compilation import compile_task
from sslvit.train.fitting import fit_micro_batch
from sslvit.train.folder import RunFolder
from sslvit.train.hardware import compile_mode, tf32_beside_bf16, trains_on_gpu
from sslvit.train.prepare import resolve_defaults
from sslvit.train.trainer import make_trainer, silence_needless_warnings

logger = logging.getLogger(__name__)

LEFT_OUT = 2  # steps at the beginning that are not timed
FEWEST, MOST = 8, 500  # steps that are timed for a budget
SHARE = 0.02  # of a budget that timing its steps may take


@dataclass
class TimedSteps:
    """Timings of real steps on this machine.

    Args:
        steps: Number of steps.
        batch: Images in each of them.
        seconds_per_step: Mean time from the end of one step to that of the next, with all that happens between them.
        waiting: Fraction of the time in which training waited for images; None if no line of metrics tells.
        memory: Peak bytes: of tensors on a GPU, of the whole process on a CPU.
        device: Type of the device.
        seconds_per_score: Time of the scores of one step (`online`, validation); 0 if the run has none.
    """

    steps: int
    batch: int
    seconds_per_step: float
    waiting: float | None
    memory: int
    device: str
    seconds_per_score: float = 0.0

    @property
    def images_per_second(self) -> float:
        """Images trained on in a second."""
        return self.batch / self.seconds_per_step

    def to_dict(self) -> dict[str, Any]:
        """The timings as plain values."""
        return asdict(self) | {"images_per_second": self.images_per_second}

    def pace_text(self) -> str:
        """How long a step and a score take, in words."""
        score = f"; {self.seconds_per_score:.3g} s per score" if self.seconds_per_score else ""
        return f"{self.seconds_per_step:.3g} s per step, the mean of {self.steps}{score}"

    def steps_within(self, seconds: float, score_every: int | None) -> int:
        """Number of steps that end in a given time, at least one.

        Args:
            seconds: The time.
            score_every: Steps between two scores; None if only the last step has one, as it always does.
        """
        intervals = 0
        if score_every is not None:
            interval_seconds = score_every * self.seconds_per_step + self.seconds_per_score
            intervals = int(seconds / interval_seconds)
            seconds -= intervals * interval_seconds
        rest = max(0, round((seconds - self.seconds_per_score) / self.seconds_per_step))
        return max(1, intervals * (score_every or 0) + rest)

    def text(self) -> str:
        """One line for a reader."""
        waiting = "" if self.waiting is None else f", {self.waiting:.0%} of it waiting for data"
        return (
            f"{self.images_per_second:,.1f} images/s in {self.steps} steps of {self.batch} images on this machine's "
            f"{'GPU' if self.device == 'cuda' else 'CPU'}{waiting}; "
            f"{self.memory / 2**30:.1f} GiB {'of its memory' if self.device == 'cuda' else 'in the whole process'}"
        )


class Ends(StepCallback):
    """Records the time at which each step ends."""

    def __init__(self) -> None:
        self.timestamps: list[float] = []

    def on_step(self, trainer: pl.Trainer, module: Any) -> None:
        """Record the time."""
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)
        self.timestamps.append(perf_counter())


def fit_budget(
    settings: RunSettings, images: int, classes: int | None, steps_per_epoch: int, global_batch_size: int
) -> tuple[TrainSettings, TimedSteps]:
    """The settings with the number of steps that `train.budget` allows on this machine, and the timings behind it.

    Steps of this run are timed for about a fiftieth of the budget, in a separate task and Trainer, and then one score.

    Args:
        settings: Settings of the run, without a number of steps.
        images: Number of images in the data set.
        classes: Number of its classes, if it has labels.
        steps_per_epoch: Optimizer steps in one pass over the data.
        global_batch_size: Images per step.

    Raises:
        ValueError: There are several ranks, whose steps one process cannot time.
    """
    train = settings.train
    assert train.budget is not None
    run = RunPlan.make(replace(train, steps=1), steps_per_epoch, global_batch_size, settings.seed)
    if run.ranks > 1:
        raise ValueError(
            f"train.budget: steps are timed in one process, and this run has {run.ranks}. Give --train.steps; sslvit "
            "plan --measure says what a step takes on one of them."
        )
    seconds = read_duration(train.budget)
    run = fit_micro_batch(run, settings, images, classes)[0]
    short = time_run(without_scores(settings), run, 2).seconds_per_step
    timed = time_run(settings, run, min(max(round(SHARE * seconds / short), FEWEST), MOST), train.log_every)
    return replace(train, steps=timed.steps_within(seconds, score_interval(settings))), timed


def without_scores(settings: RunSettings) -> RunSettings:
    """The settings of a run that computes no scores while it trains."""
    task = settings.task
    if isinstance(task, SupervisedSettings):
        task = replace(task, val=None)
    return replace(settings, online=replace(settings.online, train=None, val=None), task=task)


def time_run(settings: RunSettings, run: RunPlan, steps: int, log_every: int = 1) -> TimedSteps:
    """Time the average step of a run; if its resolution changes, some steps of each resolution are timed.

    Arguments are as for `time_steps`; each resolution gets its share of the steps, and the largest one the score.
    """
    data = settings.data
    if data.resolution_fractions is None:
        return time_steps(settings, run, steps, log_every)
    timed: list[tuple[float, TimedSteps]] = []
    for side, share in data.fractions_of_sides.items():
        assert side is not None
        alone = settings if side == data.largest_side else without_scores(settings)
        alone = replace(alone, data=replace(data, resolutions=[side], resolution_fractions=None))
        timed.append((share, time_steps(alone, run, max(round(share * steps), 2), log_every)))
    waiting = [(share, steps_of_side.waiting) for share, steps_of_side in timed if steps_of_side.waiting is not None]
    return TimedSteps(
        sum(steps_of_side.steps for _, steps_of_side in timed), run.global_batch_size,
        sum(share * steps_of_side.seconds_per_step for share, steps_of_side in timed),
        sum(share * steps_of_side for share, steps_of_side in waiting) if len(waiting) == len(timed) else None,
        max(steps_of_side.memory for _, steps_of_side in timed), timed[0][1].device,
        max(steps_of_side.seconds_per_score for _, steps_of_side in timed),
    )  # fmt: skip


def time_steps(settings: RunSettings, run: RunPlan, steps: int, log_every: int = 1) -> TimedSteps:
    """Train some steps of a run on one device of this machine, with its own loader; nothing is kept.

    Args:
        settings: Settings of the run; a folder of images is packed into the cache as for a run.
        run: Sizes of a step and of its micro-batches.
        steps: Number of timed steps. Two more before them are not timed, since memory is allocated and kernels are
            chosen there, nor is one after them, which writes a checkpoint. That one computes the run's scores, if it
            has any, whose time is given apart.
        log_every: Steps between two lines of metrics.
    """
    batch, total = run.global_batch_size, LEFT_OUT + steps + 1
    with tempfile.TemporaryDirectory(prefix="sslvit-steps-") as folder:
        train = replace(
            settings.train, devices=1, nodes=1, strategy="ddp", steps=total, budget=None,
            log_every=log_every, keep_every=None, skip_limit=total, tensorboard=False, wandb=None, mlflow=None,
        )  # fmt: skip
        task_settings = settings.task
        if isinstance(task_settings, SupervisedSettings):
            task_settings = replace(task_settings, validate_every=None)
        trial = replace(
            settings, train=train, out=folder, online=replace(settings.online, every=total), task=task_settings,
            data=replace(settings.data, global_batch_size=batch, fit_batch=False, ledger=False),
        )  # fmt: skip
        index, order = open_data(trial.data, trial.seed)
        run = replace(run, total_steps=total, steps_per_epoch=order.steps_per_epoch, ranks=1)
        trial = resolve_defaults(trial, None, index, run)
        pl.seed_everything(trial.seed, verbose=False)
        module = ShardDataModule(index, trial.data, trial.encoder, order, run)
        task = make_task(trial, run)
        if train.precision == "float64":
            task.double()
        if (mode := compile_mode(train)) is not None:
            compile_task(task, mode)
        run_folder, ends = RunFolder(folder), Ends()
        run_folder.start(asdict(trial), goes_on=False)
        trainer = make_trainer(trial, run_folder, module, [ends])
        logger.info(f"timing {steps} steps of {batch} images")
        done = track_counter("timing steps", total, "steps", lambda: len(ends.timestamps))
        with done, _silent(), tf32_beside_bf16(train), warnings.catch_warnings():
            silence_needless_warnings()
            try:
                trainer.fit(task, datamodule=module)
            except (Preempted, SystemExit) as error:  # the message names a temporary folder
                again = "stopped while steps were timed, before the first one of a run: give the same command again"
                # Lightning raises SystemExit after Ctrl-C
                kind = type(error) if isinstance(error, Preempted) else KeyboardInterrupt
                raise kind(again) from error
        waited = [line["time/data"] for line in run_folder.read_metrics()][LEFT_OUT:-1]
    seconds = (ends.timestamps[-2] - ends.timestamps[LEFT_OUT - 1]) / steps
    has_scores = without_scores(settings) != settings
    score = max(0.0, ends.timestamps[-1] - ends.timestamps[-2] - seconds) if has_scores else 0.0
    waiting = min(median(waited) / seconds, 1.0) if waited else None
    on_gpu = trains_on_gpu(train)
    memory = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return TimedSteps(steps, batch, seconds, waiting, memory, task.device.type, score)


@contextmanager
def _silent() -> Iterator[None]:
    """Mute messages on a run's health and pace, which mean nothing after a few steps."""
    ours, progress = logging.getLogger("sslvit"), logging.getLogger("sslvit.progress")
    level = ours.level
    progress.setLevel(level)  # progress is still shown
    ours.setLevel(logging.ERROR)
    try:
        yield
    finally:
        ours.setLevel(level)
        progress.setLevel(logging.NOTSET)
