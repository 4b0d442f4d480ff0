"""Has the run collapsed? Measured while it trains, said once in plain words, written to health.json.

A collapse shows in three ways (DINO, section 5.3): the teacher spreads every image over all prototypes alike; or it
gives every image to the same prototype; or the features themselves hardly differ from image to image. A sign must be
there in most of the last looks, after the warm-up, since a network that has just begun looks much the same.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from sslvit.evaluate.health import label_free, largest_fraction
from sslvit.files import to_json, write_atomically
from sslvit.ranks import all_gather
from sslvit.settings import OptimSettings, TaskSettings
from sslvit.tasks.base import Task
from sslvit.train.callbacks import StepCallback, mean_over_ranks
from sslvit.train.folder import RunFolder

logger = logging.getLogger(__name__)

FEWEST_LOOKS = 3  # that a verdict rests on; in long runs as many as fit in one fiftieth of their steps
PART_OF_THE_RUN = 50
FAIL_FRACTION = (
    0.8  # share of ill looks among the last ones that makes a collapse; as many healthy ones make a recovery
)
EVEN_FROM = 0.98  # entropy over ln K from which the teacher counts as even
STUCK_WITHIN = 0.002  # of ln K: a loss that close to it says that the student has learned nothing
ONE_FROM = 0.9  # share of the images in one prototype from which it counts as the only one
FEATURES_ALIKE_BELOW = 0.01  # deviation over images, as a share of the features' size
ONE_DIRECTION_BELOW = 1.5  # effective rank
FEWEST_IMAGES = 16  # below which a batch says nothing about how images differ


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


def measure(watched: dict[str, Tensor]) -> dict[str, float]:
    """The measures of what a task showed in one step.

    Args:
        watched: features ('b d') and, of tasks with prototypes, each image's entropy, distance to even shares and
            first choice ('b').
    """
    measures = {}
    if "features" in watched:
        features = watched["features"].float()
        measures |= label_free(features)
    if "entropy" in watched:
        measures |= {
            "teacher_entropy": float(watched["entropy"].double().mean()),
            "teacher_uniform_kl": float(watched["uniform_kl"].double().mean()),
            "largest_prototype_share": largest_fraction(watched["choice"]),
        }
    return measures


def find_sign(measures: dict[str, float], images: int, task: TaskSettings, optim: OptimSettings) -> Sign | None:
    """What is wrong in one look, if anything is.

    Args:
        measures: of `measure`, and the loss.
        images: in the batch that was measured.
        task: settings of the task; the remedy names its knobs.
        optim: settings of the optimizer.
    """
    rate = f"optim.base_lr ({optim.base_lr:g})"
    for name, value in measures.items():
        if not math.isfinite(value):
            remedy = f"Lower {rate}" + ("." if optim.clip_grad else ", or set optim.clip_grad.")
            return Sign("not finite", f"its {name.replace('_', ' ')} is {value}", remedy)
    if "teacher_entropy" not in measures:
        return None
    entropy, loss = measures["teacher_entropy"], measures["loss"]
    most = entropy + measures["teacher_uniform_kl"]  # ln K
    prototypes = f"ln {math.exp(most):.0f} = {most:.3f}"
    if entropy > EVEN_FROM * most:
        seen = (
            f"the teacher spreads each image evenly over all prototypes (entropy {entropy:.3f} of at most "
            f"{prototypes}, loss {loss:.3f})"
        )
        return Sign("even", seen, task.remedy("even", rate))
    if abs(loss - most) < STUCK_WITHIN * most:
        seen = f"the loss sits at {prototypes}: the student says the same of every prototype"
        return Sign("stuck", seen, f"Change {rate}: lower it, or raise it if it is far below a recipe's.")
    if images < FEWEST_IMAGES:
        return None
    share, deviation, rank = (measures[name] for name in ("largest_prototype_share", "feature_std", "rankme"))
    if share > ONE_FROM:
        seen = f"the teacher gives {share:.0%} of the images to one prototype (entropy {entropy:.2f})"
        return Sign("one prototype", seen, task.remedy("one prototype", rate))
    if deviation < FEATURES_ALIKE_BELOW or rank < ONE_DIRECTION_BELOW:
        seen = f"features hardly differ between images (deviation {deviation:.4f} of their size, RankMe {rank:.1f})"
        return Sign("features", seen, f"Lower {rate}, or raise data.global_batch_size or optim.warmup_epochs.")
    return None


class Health(StepCallback):
    """Looks at what the task shows every so many steps, records the measures and keeps health.json.

    Args:
        folder: of the run.
        total_steps: of the run.
        every: steps between two looks.
    """

    def __init__(self, folder: RunFolder, total_steps: int, every: int) -> None:
        self.folder, self.total_steps, self.every = folder, total_steps, every
        self.looks_needed = max(FEWEST_LOOKS, total_steps // (PART_OF_THE_RUN * every))
        self.looks: list[str | None] = []  # signs of the last looks, None for a healthy one
        self.messages: list[dict[str, Any]] = []
        self.verdict = "too early to say"

    def on_train_batch_start(self, trainer: pl.Trainer, module: Task, batch: Any, batch_idx: int) -> None:
        coming = trainer.global_step + 1
        module.is_watched = coming % self.every == 0 or coming == self.total_steps

    def on_step(self, trainer: pl.Trainer, module: Task) -> None:
        if not module.is_watched:
            return
        if module.is_skipped:  # train/incidents.py counts it; only many of them are a collapse
            module.watched.clear()
            sign = find_sign({"loss": math.nan}, 0, module.settings, module.optim)
            if trainer.is_global_zero:
                self.judge(sign, {"loss": math.nan}, is_skipped=True)
            return
        watched = {name: all_gather(torch.cat(parts)) for name, parts in module.watched.items()}
        module.watched.clear()
        measures = measure(watched)
        for name, value in measures.items():
            module.record(name, torch.tensor(value, dtype=torch.float64))
        measures["loss"] = float(mean_over_ranks(trainer, module.records["loss"]))
        images = len(watched["features"]) if watched else 0
        sign = find_sign(measures, images, module.settings, module.optim)
        if trainer.is_global_zero:
            self.judge(sign, measures, is_young=self.step <= module.young_until)

    def judge(
        self, sign: Sign | None, measures: dict[str, float], is_young: bool = False, is_skipped: bool = False
    ) -> None:
        """Weigh the last looks; say a collapse, or a recovery, once; write health.json.

        Args:
            sign: what this look found.
            measures: that it found it in.
            is_young: the network may still look like a new one.
            is_skipped: the step changed nothing, so the next one may be sound.
        """
        is_broken = sign is not None and sign.name == "not finite" and not is_skipped
        if not is_young or is_broken:
            self.looks = [*self.looks, sign.name if sign else None][-self.looks_needed :]
        ill = sum(look is not None for look in self.looks)
        needed = self.looks_needed
        if self.step == self.total_steps:
            needed = min(needed, max(len(self.looks), 2))  # a short run has no more
        if is_broken or (len(self.looks) >= needed and ill >= FAIL_FRACTION * len(self.looks)):
            if sign and (self.verdict != "collapsed" or sign.name not in [said["sign"] for said in self.messages]):
                self.say(sign.name, f"this run has probably collapsed: {sign.seen}. {sign.remedy}")
            self.verdict = "collapsed"
        elif self.verdict == "collapsed":
            if len(self.looks) - ill >= FAIL_FRACTION * len(self.looks):
                self.say("recovered", "this run has recovered from its collapse.")
                self.verdict = "healthy"
        else:
            self.verdict = "too early to say" if is_young else "suspicious" if sign else "healthy"
        self.write(measures)

    def say(self, sign: str, text: str) -> None:
        message = f"step {self.step}: {text}"
        self.messages.append({"step": self.step, "sign": sign, "message": message})
        logger.info(message)

    def write(self, measures: dict[str, float]) -> None:
        """health.json, whole."""
        content = {"verdict": self.verdict, "step": self.step, "measures": measures, "messages": self.messages}
        write_atomically(self.folder.health, to_json(content, indent=1) + "\n", sync=False)  # the next look is near

    def state_dict(self) -> dict[str, Any]:
        return {"looks": self.looks, "messages": self.messages, "verdict": self.verdict}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.looks, self.messages, self.verdict = list(state["looks"]), list(state["messages"]), state["verdict"]
