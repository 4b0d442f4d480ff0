"""Detects a collapsed run: measured during training, reported once in plain words, written to health.json.

Each task names its symptoms (tasks/symptoms.py): a teacher that is the same for every image, a loss no better than a
constant guess, features that hardly differ from image to image. A symptom counts only if most of the last checks show
it after the warm-up, since a network at the start of training looks much the same.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from sslvit.evaluate.health import label_free, largest_fraction
from sslvit.files import to_json, write_atomically
from sslvit.ranks import all_gather
from sslvit.run_plan import RunPlan
from sslvit.settings import OptimSettings
from sslvit.tasks.base import Task
from sslvit.tasks.symptoms import Symptom, lr_in_words, not_learning
from sslvit.train.callbacks.base import StepCallback, mean_over_ranks
from sslvit.train.folder import RunFolder

logger = logging.getLogger(__name__)

MIN_CHECKS = 3  # needed for a verdict; in long runs, as many as fit in one fiftieth of the steps
CHECKS_PER_RUN = 50
MAX_CHECKS = 250  # in a run; the host computes spectra meanwhile, for 30 to 240 ms, and a GPU may have to wait
MAX_ROWS = 512  # of features, since their spectrum is computed on the CPU
CURVE_LOOKS = 20  # checks of the loss curve in the second half of a run
FAIL_FRACTION = 0.8  # of the last checks show a symptom in a collapse, and none after a recovery
NOT_CHECKED, NOT_LEARNING, TOO_EARLY = "not checked", "not learning", "too early to say"


def checked_every(total_steps: int, log_every: int) -> int:
    """Number of steps between two checks: those of a line of metrics, or of several where a run has very many."""
    return log_every * max(1, total_steps // (MAX_CHECKS * log_every))


def measure(logged: dict[str, Tensor]) -> dict[str, float]:
    """Measures of what a task logged in one step.

    Args:
        logged: Features ('b d'); for tasks with prototypes, each image's entropy, distance to even probabilities and
            first choice ('b'); and for each micro-batch the moments of an MAE's target ('m 3 p') or how often an iGPT's
            colors occur ('m k').
    """
    measures: dict[str, float] = {}
    if "target_moments" in logged:  # the error of predicting the mean patch
        mean, hidden_mean, hidden_square = logged["target_moments"].double().mean(0)
        measures["target_variance"] = float((hidden_square - 2 * mean * hidden_mean + mean**2).mean())
    if "color_counts" in logged:  # the loss of predicting the color frequencies, in nats
        counts = logged["color_counts"].sum(0).double()
        measures["unigram_entropy"] = float(-torch.xlogy(counts, counts / counts.sum()).sum() / counts.sum())
    if "features" in logged:
        features = logged["features"]
        measures |= label_free(features[:: math.ceil(len(features) / MAX_ROWS)].float().cpu())
    if "entropy" in logged:
        measures |= {
            "teacher_entropy": float(logged["entropy"].double().mean()),
            "teacher_uniform_kl": float(logged["uniform_kl"].double().mean()),
            "largest_prototype_share": largest_fraction(logged["choice"]),
        }
    return measures


def not_finite(measures: dict[str, float], optim: OptimSettings) -> Symptom | None:
    """A symptom for the first measure that is not finite; None if all are."""
    for name, value in measures.items():
        if not math.isfinite(value):
            suggestion = f"Lower {lr_in_words(optim)}" + ("." if optim.clip_grad else ", or set optim.clip_grad.")
            return Symptom("not finite", f"its {name.replace('_', ' ')} is {value}", suggestion)
    return None


class Health(StepCallback):
    """Checks what the task logs every so many steps, records the measures and keeps health.json.

    Args:
        folder: The run's folder.
        run: The run's length.
        every: Steps between two checks.
    """

    def __init__(self, folder: RunFolder, run: RunPlan, every: int) -> None:
        self.folder, self.total_steps, self.every = folder, run.total_steps, every
        self.checks_needed = max(MIN_CHECKS, run.total_steps // (CHECKS_PER_RUN * every))
        self.checks: list[str | None] = []  # symptoms of the last checks, None for a healthy one
        self.messages: list[dict[str, Any]] = []
        self.verdict = NOT_CHECKED
        self.is_stuck = False  # whether the loss had stopped falling at the last check of its curve

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        """Ask the task for features in steps that are checked."""
        coming = trainer.global_step + 1
        module.logs_features = coming % self.every == 0 or coming == self.total_steps

    def on_step(self, trainer: pl.Trainer, module: Task) -> None:
        """Measure, record and judge."""
        if not module.logs_features:
            return
        if module.guard.skipped:  # counted by callbacks/incidents.py; only many of them are a collapse
            measures = {"loss": math.nan}
            if trainer.is_global_zero:
                self.judge(not_finite(measures, module.optim), measures, is_skipped=True)
            return
        logged = {name: all_gather(torch.cat(tensors)) for name, tensors in module.logged_features.items()}
        measures = measure(logged)
        for name, value in measures.items():
            module.record(f"health/{name}", torch.tensor(value, dtype=torch.float64))
        measures["loss"] = float(mean_over_ranks(trainer, module.records["train/loss"]))
        symptoms = module.symptoms(measures | {"images": float(len(logged["features"]))})
        symptom = not_finite(measures, module.optim) or next(iter(symptoms or []), None)
        if not trainer.is_global_zero:
            return
        if symptoms is None and symptom is None:
            self.verdict = NOT_CHECKED
            self.write(measures)
        else:
            self.judge(symptom, measures, is_early=self.step <= module.health_grace_steps)
            if module.loss_shows_learning and self.is_curve_due():
                self.judge_curve(measures, module.health_grace_steps, module.optim)

    def is_curve_due(self) -> bool:
        """Whether to check the loss curve now: up to CURVE_LOOKS times in the second half of a run, and at its end."""
        often = max(self.total_steps // (2 * CURVE_LOOKS), 1)
        is_late = self.step * 2 >= self.total_steps
        return is_late and (self.step == self.total_steps or self.step % often < self.every)

    def judge_curve(self, measures: dict[str, float], grace_steps: int, optim: OptimSettings) -> None:
        """Report once if the loss of an otherwise healthy run has not fallen in the latter half of the steps so far."""
        if self.verdict not in ("healthy", NOT_LEARNING):
            return
        first = max(self.step // 2, grace_steps) + 1
        lines = [line for line in self.folder.read_metrics() if first <= line["step"] < self.step]
        losses = [line["train/loss"] for line in lines if math.isfinite(line.get("train/loss", math.nan))]
        symptom = not_learning([*losses, measures["loss"]], first, optim)
        if symptom and symptom.name not in [message["symptom"] for message in self.messages]:
            self.report(symptom.name, f"{symptom.seen}. {symptom.suggestion}")
        self.is_stuck = symptom is not None
        self.verdict = NOT_LEARNING if symptom else "healthy"
        self.write(measures)

    def judge(
        self, symptom: Symptom | None, measures: dict[str, float], is_early: bool = False, is_skipped: bool = False
    ) -> None:
        """Judge the last checks; report a collapse, or a recovery, once; write health.json.

        Args:
            symptom: The symptom that this check found; None if it found none.
            measures: The measures of this check.
            is_early: Whether the network may still look untrained.
            is_skipped: Whether the step changed nothing, so that the next one may be sound.
        """
        is_broken = symptom is not None and symptom.name == "not finite" and not is_skipped
        if not is_early or is_broken:
            self.checks = [*self.checks, symptom.name if symptom else None][-self.checks_needed :]
        failed = sum(check is not None for check in self.checks)
        needed = self.checks_needed
        if self.step == self.total_steps:
            needed = min(needed, max(len(self.checks), 2))  # a short run has no more
        if is_broken or (len(self.checks) >= needed and failed >= FAIL_FRACTION * len(self.checks)):
            reported = [message["symptom"] for message in self.messages]
            if symptom and (self.verdict != "collapsed" or symptom.name not in reported):
                self.report(symptom.name, f"this run has probably collapsed: {symptom.seen}. {symptom.suggestion}")
            self.verdict = "collapsed"
        elif self.verdict == "collapsed":
            if len(self.checks) - failed >= FAIL_FRACTION * len(self.checks):
                self.report("recovered", "this run has recovered from its collapse.")
                self.verdict = "healthy"
        else:
            is_early = is_early or len(self.checks) < MIN_CHECKS
            self.verdict = (
                TOO_EARLY if is_early else "suspicious" if symptom else NOT_LEARNING if self.is_stuck else "healthy"
            )
        self.write(measures)

    def report(self, symptom: str, text: str) -> None:
        """Print a message, and keep it for health.json."""
        message = f"step {self.step}: {text}"
        self.messages.append({"step": self.step, "symptom": symptom, "message": message})
        logger.info(message)

    def write(self, measures: dict[str, float]) -> None:
        """Write health.json."""
        content = {"verdict": self.verdict, "step": self.step, "measures": measures, "messages": self.messages}
        write_atomically(self.folder.health, to_json(content, indent=1) + "\n", sync=False)  # soon rewritten

    def state_dict(self) -> dict[str, Any]:
        """The last checks, and what was reported."""
        return {"checks": self.checks, "messages": self.messages, "verdict": self.verdict, "is_stuck": self.is_stuck}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of the checkpoint."""
        self.checks, self.messages, self.verdict = list(state["checks"]), list(state["messages"]), state["verdict"]
        self.is_stuck = state["is_stuck"]
