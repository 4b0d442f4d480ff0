"""The Python doors that take names and paths instead of settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sslvit.settings.load import load_recipe
from sslvit.train.folder import RunFolder
from sslvit.train.run import pretrain as run_settings


def pretrain(
    config: str | Path,
    data: str | Path | None = None,
    out: str | Path | None = None,
    init: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    **changes: Any,
) -> RunFolder:
    """Pretrain by a recipe.

    Args:
        config: a YAML file, or the name of a recipe such as mae/vit_tiny_cifar10.
        data: a folder of images or of shards; replaces the recipe's data.shards.
        out: the run folder; replaces the recipe's.
        init: an encoder to start from.
        resume: go on from the run folder's last checkpoint.
        overwrite: delete an earlier run there first.
        changes: other settings by dotted key: ``**{"train.epochs": 10}``.
    """
    given = {"data.shards": data, "out": out, "init": init}
    changes |= {key: str(value) for key, value in given.items() if value is not None}
    return run_settings(load_recipe(config, changes), resume=resume, overwrite=overwrite)
