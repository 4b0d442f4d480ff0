"""The recipes that `sslvit demo` runs, and changes to them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from sslvit.settings.load import by_dotted_key, check_changes, load_recipe

RECIPES = {
    "digits": {"mae": "mae/digits", "dino": "dino/digits", "igpt": "igpt/digits"},
    "cifar10": {"mae": "mae/vit_tiny_cifar10", "dino": "dino/vit_tiny_cifar10", "igpt": "igpt/small_cifar10"},
}
# on a CPU, the CIFAR-10 demo only shows the procedure: the full recipes would take weeks
CIFAR10_ON_A_CPU: dict[str, dict[str, Any]] = {
    "mae": {"data.global_batch_size": 128, "optim.base_lr": 1e-3, "optim.warmup_epochs": 0.15, "train.steps": 400},
    "dino": {"data.global_batch_size": 64, "optim.warmup_epochs": None, "task.momentum": 0.99, "train.steps": 100},
    "igpt": {
        "encoder.width": 96,
        "encoder.depth": 4,
        "encoder.heads": 3,
        "data.global_batch_size": 4,
        "optim.base_lr": 0.256,
        "optim.warmup_epochs": None,
        "train.steps": 300,
    },
}


def split_changes(recipes: dict[str, str], changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Changes for each task: those with a key in its recipe, and those in no recipe (presets and unknown keys)."""
    known = {task: by_dotted_key(asdict(load_recipe(recipe))) for task, recipe in recipes.items()}
    everywhere = [key for key in changes if not any(key in keys for keys in known.values())]
    return {
        task: {key: value for key, value in changes.items() if key in keys or key in everywhere}
        for task, keys in known.items()
    }


def check_demo(data: str, changes: dict[str, Any]) -> None:
    """Raise an error for changes that are invalid for a recipe of the demo, before anything is packed."""
    for task, changed in split_changes(RECIPES[data], changes).items():
        check_changes(RECIPES[data][task], changed)
