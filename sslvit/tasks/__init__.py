"""Training tasks, one paper per file, and a table of their names in settings. Tasks are imported lazily."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from sslvit.messages import for_python
from sslvit.settings.run import find_task

if TYPE_CHECKING:
    from sslvit.run_plan import RunPlan
    from sslvit.settings import RunSettings
    from sslvit.tasks.base import Task

TASKS = {
    "mae": ("sslvit.tasks.mae", "MAE"),
    "dino": ("sslvit.tasks.dino", "DINO"),
    "igpt": ("sslvit.tasks.igpt", "IGPT"),
    "supervised": ("sslvit.tasks.supervised", "Supervised"),
}


def task_class(name: str) -> type[Task]:
    """The Lightning module of a task by name, including tasks of plugins."""
    if name not in TASKS:
        return find_task(name)
    module, attribute = TASKS[name]
    return getattr(import_module(module), attribute)


@for_python
def make_task(settings: RunSettings, run: RunPlan) -> Task:
    """Make the task described by a run's settings."""
    return task_class(settings.task.name)(settings.task, settings.encoder, settings.optim, run)


def __getattr__(name: str) -> type:
    for module, attribute in TASKS.values():
        if attribute == name:
            return getattr(import_module(module), attribute)
    raise AttributeError(f"sslvit.tasks has no task '{name}'")
