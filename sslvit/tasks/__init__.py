"""Pretext tasks, one paper per file, and the table that settings name them by. Loads lazily."""

from importlib import import_module

TASKS = {
    "mae": ("sslvit.tasks.mae", "MAE"),
    "dino": ("sslvit.tasks.dino", "DINO"),
    "igpt": ("sslvit.tasks.igpt", "IGPT"),
    "supervised": ("sslvit.tasks.supervised", "Supervised"),
}


def task_class(name: str) -> type:
    """The Lightning module of a task."""
    module, attribute = TASKS[name]
    return getattr(import_module(module), attribute)


def __getattr__(name: str) -> type:
    for module, attribute in TASKS.values():
        if attribute == name:
            return getattr(import_module(module), attribute)
    raise AttributeError(f"sslvit.tasks has no task '{name}'")
