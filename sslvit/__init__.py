"""Self-supervised pretraining for vision transformers: MAE, DINO and iGPT on one shared encoder, from shard to export.

Importing this package imports no torch; the names below load what they need on first use.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import Any

from sslvit.messages import MessageHandler

__version__ = "0.1.0"

# what a run has to say reaches the screen from Python as it does from the command line; `--quiet` raises this level
_logger = logging.getLogger("sslvit")
_logger.setLevel(logging.INFO)
_logger.addHandler(MessageHandler())
_logger.propagate = False

_LAZY = {
    "load_encoder": "sslvit.checkpoint",
    "save_encoder": "sslvit.checkpoint",
    "pretrain": "sslvit.api",
    "resume": "sslvit.api",
    "finetune": "sslvit.api",
    "plan": "sslvit.api",
    "load_recipe": "sslvit.settings.load",
    "make_task": "sslvit.tasks",
    "RunPlan": "sslvit.run_plan",
    "ShardDataModule": "sslvit.data.module",
    "ViTEncoder": "sslvit.models",
    "EncoderSettings": "sslvit.settings",
    "tasks": "",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'sslvit' has no attribute '{name}'")
    return getattr(import_module(_LAZY[name]), name) if _LAZY[name] else import_module(f"sslvit.{name}")


def __dir__() -> list[str]:
    return [*globals(), *_LAZY]
