"""Self-supervised pretraining for vision transformers: MAE, DINO and iGPT on one shared encoder, from shard to export.

    import sslvit

    encoder = sslvit.load_encoder("zoo:cifar10/dino")
    features = encoder.features(encoder.preprocess("dog.jpg"))
    run = sslvit.pretrain("mae/own_images", data="photos", out="runs/photos")

Each function does the same as the command of its name and takes that command's options as keywords. It returns an
object that prints like the command's output, with `to_dict()` for programs and the paths of the files it wrote.

Importing this package does not import torch; the names below load their modules on first use.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from sslvit.messages import MessageHandler

if TYPE_CHECKING:
    from sslvit import tasks
    from sslvit.api import export, finetune, pretrain, resume
    from sslvit.checkpoint import load_encoder, save_encoder
    from sslvit.data.module import ShardDataModule
    from sslvit.evaluation import compare, embed, health, knn, probe
    from sslvit.models import Backbone, ViTEncoder
    from sslvit.pixel_models import likelihood, sample
    from sslvit.plugins import use_plugin
    from sslvit.reports.bench import bench
    from sslvit.reports.show import show
    from sslvit.reports.sweep import sweep
    from sslvit.run_plan import RunPlan
    from sslvit.segmentation import segment
    from sslvit.settings import EncoderSettings
    from sslvit.settings.load import load_recipe
    from sslvit.settings.recipes import recipes
    from sslvit.shards import check, fit_palette, pack
    from sslvit.tasks import make_task
    from sslvit.train.branch import branch
    from sslvit.train.planning import plan
    from sslvit.train.report import report
    from sslvit.train.runs import runs

__version__ = "0.1.0"

# messages reach the screen from Python as they do from the command line; `--quiet` raises this level
_logger = logging.getLogger("sslvit")
_logger.setLevel(logging.INFO)
_logger.addHandler(MessageHandler())
_logger.propagate = False

# name -> the module that defines it; "" for a subpackage of sslvit
_LAZY = {
    "Backbone": "sslvit.models",
    "EncoderSettings": "sslvit.settings",
    "RunPlan": "sslvit.run_plan",
    "ShardDataModule": "sslvit.data.module",
    "ViTEncoder": "sslvit.models",
    "bench": "sslvit.reports.bench",
    "branch": "sslvit.train.branch",
    "check": "sslvit.shards",
    "compare": "sslvit.evaluation",
    "embed": "sslvit.evaluation",
    "export": "sslvit.api",
    "finetune": "sslvit.api",
    "fit_palette": "sslvit.shards",
    "health": "sslvit.evaluation",
    "knn": "sslvit.evaluation",
    "likelihood": "sslvit.pixel_models",
    "load_encoder": "sslvit.checkpoint",
    "load_recipe": "sslvit.settings.load",
    "make_task": "sslvit.tasks",
    "pack": "sslvit.shards",
    "plan": "sslvit.train.planning",
    "pretrain": "sslvit.api",
    "probe": "sslvit.evaluation",
    "recipes": "sslvit.settings.recipes",
    "report": "sslvit.train.report",
    "resume": "sslvit.api",
    "runs": "sslvit.train.runs",
    "sample": "sslvit.pixel_models",
    "save_encoder": "sslvit.checkpoint",
    "segment": "sslvit.segmentation",
    "show": "sslvit.reports.show",
    "sweep": "sslvit.reports.sweep",
    "tasks": "",
    "use_plugin": "sslvit.plugins",
}
__all__ = [
    "Backbone",
    "EncoderSettings",
    "RunPlan",
    "ShardDataModule",
    "ViTEncoder",
    "bench",
    "branch",
    "check",
    "compare",
    "embed",
    "export",
    "finetune",
    "fit_palette",
    "health",
    "knn",
    "likelihood",
    "load_encoder",
    "load_recipe",
    "make_task",
    "pack",
    "plan",
    "pretrain",
    "probe",
    "recipes",
    "report",
    "resume",
    "runs",
    "sample",
    "save_encoder",
    "segment",
    "show",
    "sweep",
    "tasks",
    "use_plugin",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'sslvit' has no attribute '{name}'")
    return getattr(import_module(_LAZY[name]), name) if _LAZY[name] else import_module(f"sslvit.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
