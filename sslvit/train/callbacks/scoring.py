"""Scores while a run trains: a probe of a pretext task's encoder, or the accuracy of a classifier.

Both use the module in evaluation mode and without gradients, and restore torch's random state, so a run with scores has
the same weights as one without.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import pytorch_lightning as pl
import torch

from sslvit.data.index import ShardIndex
from sslvit.data.mixture import Index
from sslvit.data.open import open_shards
from sslvit.data.overlap import check_same_data
from sslvit.data.plan import evenly_spaced
from sslvit.data.stream import StreamIndex
from sslvit.environment import pick_workers
from sslvit.evaluate.classify import Accuracy, accuracy
from sslvit.evaluate.features import FeatureExtractor
from sslvit.evaluate.knn import knn_accuracies
from sslvit.evaluate.label_free import measures_of
from sslvit.evaluate.labeled import check_classes, check_same_classes, open_labeled
from sslvit.evaluate.linear import fit_probe
from sslvit.evaluate.sources import LabeledSet, NoScore, frozen, full_float32
from sslvit.files import to_json, write_atomically
from sslvit.models.backbone import evaluating
from sslvit.ranks import broadcast_from_rank0, is_first_rank
from sslvit.settings import ProbeSettings, RunSettings, SupervisedSettings
from sslvit.tasks.base import Task
from sslvit.train.callbacks.base import StepCallback
from sslvit.train.folder import RunFolder, read_json

logger = logging.getLogger(__name__)

IMAGES_AT_ONCE = 256


@contextmanager
def scoring(module: Task) -> Iterator[None]:
    """Evaluation mode without gradients, in full float32; restores modes and torch's random state."""
    # a loader draws a seed for its workers from torch's random state when it starts
    with evaluating(module), torch.no_grad(), torch.random.fork_rng(devices=[]), full_float32():
        yield


def score_interval(settings: RunSettings) -> int | None:
    """Steps between two scores of a run; None if at most its last step has one."""
    online, task = settings.online, settings.task
    every = [online.every] if online.train is not None else []
    if isinstance(task, SupervisedSettings) and task.val is not None and task.validate_every:
        every.append(task.validate_every)
    return min((rounded_up(steps, settings.train.log_every) for steps in every), default=None)


def rounded_up(every: int, log_every: int) -> int:
    """Steps between two scores, which come with a line of metrics.jsonl."""
    return math.ceil(every / log_every) * log_every


class ScoringCallback(StepCallback):
    """Computes scores at some of the steps with a line of metrics.jsonl, and after the last step.

    Args:
        every: Steps between two scores, rounded up to a multiple of log_every; None for the last step only.
        log_every: Steps between two lines.
        total_steps: Number of optimizer steps in the run.
    """

    def __init__(self, every: int | None, log_every: int, total_steps: int) -> None:
        self.every = rounded_up(every, log_every) if every else total_steps
        self.total_steps = total_steps

    def on_step(self, trainer: pl.Trainer, module: Task) -> None:
        """Compute and record scores when they are due."""
        if self.step % self.every and self.step != self.total_steps:
            return
        with scoring(module):
            try:
                found = self.scores(trainer, module)
            except NoScore as error:  # raised on all ranks
                found = {}
                if is_first_rank():
                    logger.warning(f"step {self.step}: no score: {error}")
            for name, value in found.items():
                module.record(name, torch.tensor(value, dtype=torch.float64))

    def scores(self, trainer: pl.Trainer, module: Task) -> dict[str, float]:
        """Scores by name for the line, the same on every rank."""
        raise NotImplementedError


class OnlineProbe(ScoringCallback):
    """kNN and logistic regression on some labeled images, and all measures that need no labels."""

    def __init__(self, settings: RunSettings, total_steps: int) -> None:
        online = self.online = settings.online
        assert online.train is not None
        assert online.val is not None
        super().__init__(online.every, settings.train.log_every, total_steps)
        self.seed, self.workers = settings.seed, settings.data.workers
        indices = open_labeled(ProbeSettings(online.train, online.val, neighbors=[], allow_same_data=True))
        channels = settings.encoder.channels
        limit = settings.data.max_unreadable_fraction
        self.train, self.val = (
            LabeledSet(index, channels, evenly_spaced(len(index), online.images), limit) for index in indices
        )

    def scores(self, trainer: pl.Trainer, module: Task) -> dict[str, float]:
        """Scores of kNN and of a linear head, and measures that need no labels, all on the module's device."""
        source = frozen(module.gather_trained_encoder(), self.online.precision)
        readouts = source.readouts(None, 1, None)
        workers = pick_workers(self.workers, source.device.type, trainer.num_devices)
        extractor = FeatureExtractor(min(IMAGES_AT_ONCE, self.online.images), workers)
        train, val = (extractor.features(source, data, readouts).at(readouts) for data in (self.train, self.val))
        found = measures_of(source, self.val, extractor, seed=self.seed)
        found = {f"probe/{name}": value for name, value in found.items()}
        if is_first_rank():
            classes = len(self.train.classes)
            k = min(self.online.neighbors, len(train))
            found |= {
                "probe/knn": knn_accuracies(train, val, classes, [k], 0.07, source.device)[k],
                "probe/linear": fit_probe(train, classes, self.seed, source.device).accuracy(val),
            }
        return broadcast_from_rank0(found)


class Validation(ScoringCallback):
    """A classifier's accuracy on the reported images; the last one is written to scores.json."""

    def __init__(
        self, settings: RunSettings, task: SupervisedSettings, folder: RunFolder, index: Index | StreamIndex,
        total_steps: int,
    ) -> None:  # fmt: skip
        super().__init__(task.validate_every, settings.train.log_every, total_steps)
        self.settings, self.folder = settings, folder
        assert isinstance(index, ShardIndex)  # streams and mixtures have no labels to train on
        data, named = settings.data, task.val or ""
        val = open_shards(named, check=lambda found: check_same_classes(index, found.classes, named))
        check_classes(index, val, ProbeSettings("", "", neighbors=[]))
        check_same_data(index, val, task.allow_same_data, "--task.allow_same_data true")
        self.data = LabeledSet(val, settings.encoder.channels, None, data.max_unreadable_fraction, data.memory_limit_mb)
        self.trained_on, self.start = index.fingerprint(), time.monotonic()
        self.has_ended = False  # whether no step will follow

    def scores(self, trainer: pl.Trainer, module: Task) -> dict[str, float]:
        """The accuracy; after the last step it is also written to scores.json."""
        module = module.gather_full_copy()
        found = accuracy(
            lambda images: module.model(images.to(module.dtype)), self.data, self.settings.encoder, module.device,
            IMAGES_AT_ONCE, pick_workers(self.settings.data.workers, module.device.type, trainer.num_devices),
        )  # fmt: skip
        if (self.step == self.total_steps or self.has_ended) and trainer.is_global_zero:
            self.write(found)
        return {"val/top1": found.top1}

    def on_fit_end(self, trainer: pl.Trainer, module: Any) -> None:
        """Score the last step if it has no score: the score failed there, or a callback ended the run at that step.

        Raises:
            NoScore: the score of the run's last step fails again. The weights are saved, and a resume tries once more.
        """
        scored_step = (read_json(self.folder.scores) or {}).get("step")
        if broadcast_from_rank0(scored_step == trainer.global_step):
            return
        self.step, self.has_ended = trainer.global_step, True
        module.to(trainer.strategy.root_device)  # Lightning has moved it to the CPU
        try:
            with scoring(module):
                self.scores(trainer, module)
        except NoScore as error:  # on all ranks alike
            if self.step == self.total_steps:
                raise
            logger.warning(f"step {self.step}: no score: {error}")
        module.cpu()

    def write(self, found: Accuracy) -> None:
        """Write scores.json."""
        about = {
            **asdict(found), "val": self.data.index.location, "fingerprint": self.data.index.fingerprint(),
            "step": self.step, "init": self.settings.init, "seed": self.settings.seed, "reported": "the last step",
            "is_training_data": self.data.index.fingerprint() == self.trained_on,
            "seconds_since_start": time.monotonic() - self.start,
        }  # fmt: skip
        write_atomically(self.folder.scores, to_json(about, indent=1) + "\n")
