"""One pretraining run: the record that a recipe in configs/ fills in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from sslvit.files import brief, expand_path
from sslvit.plugins import find_plugin
from sslvit.settings.choices import Choice, check_bounds
from sslvit.settings.data import DataSettings
from sslvit.settings.dino import DINOSettings
from sslvit.settings.encoder import EncoderSettings
from sslvit.settings.igpt import IGPTSettings
from sslvit.settings.mae import MAESettings
from sslvit.settings.online import OnlineSettings
from sslvit.settings.optim import OptimSettings
from sslvit.settings.supervised import SupervisedSettings
from sslvit.settings.task import TaskSettings
from sslvit.settings.train import TrainSettings

TASK_SETTINGS: dict[str, type[TaskSettings]] = {
    "mae": MAESettings, "dino": DINOSettings, "igpt": IGPTSettings, "supervised": SupervisedSettings,
}  # fmt: skip


def task_settings(name: str) -> type[TaskSettings] | None:
    """The settings dataclass of a plugin's task; None for an unknown name."""
    found = find_task(name)
    return found.settings_class if found else None


def find_task(name: str) -> Any:
    """The task class of a plugin, by import path or registered name; None for an unknown name."""
    found = find_plugin("task.name", name)
    if found is not None and not issubclass(getattr(found, "settings_class", object), TaskSettings):
        raise ValueError(f"task.name: {brief(name)} is no task. Its class must derive from sslvit.tasks.base.Task.")
    return found


TASK_CHOICE = Choice("name", "mae", TASK_SETTINGS, task_settings)


@dataclass
class RunSettings:
    """Everything that decides a run's result."""

    task: Annotated[TaskSettings, TASK_CHOICE] = field(default_factory=MAESettings)
    """Training task; its name picks the other keys."""
    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    """Architecture and input of the encoder."""
    data: DataSettings = field(default_factory=DataSettings)
    """Training data."""
    optim: OptimSettings = field(default_factory=OptimSettings)
    """Optimizer and schedules."""
    train: TrainSettings = field(default_factory=TrainSettings)
    """Length, hardware and outputs of the run."""
    online: OnlineSettings = field(default_factory=OnlineSettings)
    """Evaluation with labels during pretraining."""
    seed: int = 0
    """Seed of the weights, the order of the data, the crops and the masks."""
    out: str = "runs/new"
    """Run folder."""
    init: str | None = None
    """Encoder whose weights are the initialization; null for random weights."""

    def __post_init__(self) -> None:
        self.out = expand_path(self.out)
        self.init = self.init and expand_path(self.init)
        check_bounds(self, "", "0 or more", "seed")
