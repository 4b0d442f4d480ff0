"""Has the run collapsed? Measured while it trains, said once in plain words, written to health.json.

A collapse shows in three ways (DINO, section 5.3): the teacher spreads every image over all prototypes alike; or it
gives every image to the same prototype; or the features themselves hardly differ from image to image. A sign must be
there in several looks in a row, after the warm-up, since a network that has just begun looks much the same.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch

from sslvit.evaluate.health import feature_std, largest_prototype_share, mean_entropy, rankme
from sslvit.settings import DINOSettings, OptimSettings, TaskSettings
from sslvit.tasks.base import PretextTask
from sslvit.train.callbacks import StepCallback, mean_over_ranks
from sslvit.train.folder import RunFolder

LOOKS_IN_A_ROW = 3  # at least; in long runs for one fiftieth of their steps
PART_OF_THE_RUN = 50
EVEN_FROM = 0.98  # entropy over ln K from which the teacher counts as even
STUCK_WITHIN = 0.002  # of ln K: a loss that close to it says that the student has learned nothing
ONE_FROM = 0.9  # share of the images in one prototype from which it counts as the only one
FEATURES_ALIKE_BELOW = 0.01  # deviation over images, as a share of the features' size


@dataclass
class Sign:
    """A way in which training fails.

    Args:
        name: short.
        seen: what is seen, in words.
        remedy: which knob to turn.
    """

    name: str
    seen: str
    remedy: str


def measure(watched: dict[str, torch.Tensor]) -> dict[str, float]:
    """The measures of what a task showed in one step.

    Args:
        watched: features ('b d') and, of tasks with prototypes, targets ('b k').
    """
    measures = {}
    if "features" in watched:
        features = watched["features"].float()
        measures |= {"feature_std": feature_std(features), "rankme": rankme(features)}
    if "targets" in watched:
        targets = watched["targets"].float()
        entropy = mean_entropy(targets)
        measures |= {
            "teacher_entropy": entropy,
            "teacher_uniform_kl": math.log(targets.shape[1]) - entropy,
            "largest_prototype_share": largest_prototype_share(targets),
        }
    return measures


def find_sign(measures: dict[str, float], task: TaskSettings, optim: OptimSettings) -> Sign | None:
    """What is wrong in one look, if anything is.

    Args:
        measures: of `measure`, and the loss.
        task: settings of the task; the remedy names its knobs.
        optim: settings of the optimiser.
    """
    loss = measures.get("loss", 0.0)
    rate = f"optim.base_rate ({optim.base_rate:g})"
    if not math.isfinite(loss):
        return Sign("not finite", f"the loss is {loss}", f"Lower {rate}, or set optim.clip.")
    if isinstance(task, DINOSettings) and "teacher_entropy" in measures:
        most = math.log(task.out_dim)
        entropy, share = measures["teacher_entropy"], measures["largest_prototype_share"]
        if entropy > EVEN_FROM * most:
            seen = (
                f"the teacher spreads each image evenly over all prototypes (entropy {entropy:.2f} of at most "
                f"ln {task.out_dim} = {most:.2f}, loss {loss:.2f})"
            )
            return Sign("even", seen, _sharpen(task, rate))
        if share > ONE_FROM:
            seen = f"the teacher gives {share:.0%} of the images to one prototype (entropy {entropy:.2f})"
            return Sign("one prototype", seen, _centre(task, rate))
        if abs(loss - most) < STUCK_WITHIN * most:
            seen = f"the loss sits at ln {task.out_dim} = {most:.3f}: the student says the same of every prototype"
            return Sign("stuck", seen, f"Change {rate}: lower it, or raise it if it is far below a recipe's.")
    if measures.get("feature_std", 1.0) < FEATURES_ALIKE_BELOW:
        seen = (
            f"features hardly differ between images (deviation {measures['feature_std']:.4f} of their size, RankMe "
            f"{measures['rankme']:.1f})"
        )
        return Sign("features", seen, f"Lower {rate}, or raise data.global_batch or optim.warmup_epochs.")
    return None


def _sharpen(task: DINOSettings, rate: str) -> str:
    """The knob for a teacher that is too even."""
    temperature = f"task.teacher_temperature ({task.teacher_temperature:g})"
    if task.teacher_temperature >= task.student_temperature:
        return (
            f"Set {temperature} well below task.student_temperature ({task.student_temperature:g}): "
            "0.04 to 0.07 is usual."
        )
    if task.teacher_temperature > 0.07 or task.warmup_teacher_temperature > 0.07:
        return f"Lower {temperature} and task.warmup_teacher_temperature; 0.04 to 0.07 is usual."
    return (
        f"Lower {rate} or {temperature}; for small data or batches set task.batch_norm to true, or another "
        f"task.out_dim ({task.out_dim})."
    )


def _centre(task: DINOSettings, rate: str) -> str:
    """The knob for a teacher with one prototype."""
    if task.centring == "mean" and task.centre_momentum > 0.99:
        return f"The centre hardly moves: lower task.centre_momentum ({task.centre_momentum:g}); 0.9 is usual."
    return (
        f"Lower {rate}, or raise data.global_batch or task.teacher_temperature ({task.teacher_temperature:g}); for "
        "small data set task.batch_norm to true; task.centring: sinkhorn keeps all prototypes in use."
    )


class Health(StepCallback):
    """Looks at what the task shows every so many steps, records the measures and keeps health.json.

    Args:
        folder: of the run.
        total_steps: of the run.
        every: steps between two looks.
    """

    def __init__(self, folder: RunFolder, total_steps: int, every: int) -> None:
        self.folder, self.total_steps, self.every = folder, total_steps, every
        self.looks_needed = max(LOOKS_IN_A_ROW, total_steps // (PART_OF_THE_RUN * every))
        self.streak: dict[str, Any] = {"name": None, "looks": 0, "since": 0}
        self.messages: list[dict[str, Any]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: PretextTask, batch: Any, batch_idx: int) -> None:
        coming = trainer.global_step + 1
        module.is_watched = coming % self.every == 0 or coming == self.total_steps

    def on_step(self, trainer: pl.Trainer, module: PretextTask) -> None:
        if not module.is_watched:
            return
        watched = {name: torch.cat(parts) for name, parts in module.watched.items()}
        module.watched.clear()
        measures = {name: torch.tensor(value, dtype=torch.float64) for name, value in measure(watched).items()}
        if not measures:
            return
        for name, value in measures.items():
            module.record(name, value)
        line = {name: mean_over_ranks(trainer, module.records[name]) for name in [*measures, "loss"]}
        if trainer.is_global_zero:
            self.judge(line, module)

    def judge(self, measures: dict[str, float], module: PretextTask) -> None:
        """Count how long a sign has been there; say it once when that is long enough."""
        sign = find_sign(measures, module.settings, module.optim)
        name = sign.name if sign else None
        if name != self.streak["name"]:
            self.streak = {"name": name, "looks": 0, "since": self.step}
        is_early = self.step <= module.settled_from and name != "not finite"
        self.streak["looks"] += not is_early
        is_ill = sign is not None and self.streak["looks"] >= (1 if name == "not finite" else self.looks_needed)
        if is_ill and name not in [message["sign"] for message in self.messages]:
            text = f"step {self.step}: this run has probably collapsed: {sign.seen}. {sign.remedy}"
            self.messages.append({"step": self.step, "sign": name, "message": text})
            print(text, flush=True)
        verdict = "too early to say" if is_early else "collapsed" if is_ill else "healthy"
        content = {"verdict": verdict, "step": self.step, "measures": measures, "messages": self.messages}
        part = self.folder.health.with_suffix(".part")
        part.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(part, self.folder.health)

    def state_dict(self) -> dict[str, Any]:
        return {"streak": self.streak, "messages": self.messages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.streak, self.messages = dict(state["streak"]), list(state["messages"])
