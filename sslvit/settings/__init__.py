"""Settings dataclasses for recipes and commands. Importing this package does not import torch."""

from sslvit.settings.data import DataSettings
from sslvit.settings.encoder import EncoderSettings
from sslvit.settings.presets import PRESETS, preset
from sslvit.settings.probe import ProbeSettings
from sslvit.settings.protocols import LogregSettings
from sslvit.settings.run import TASK_SETTINGS, OptimSettings, RunSettings, TrainSettings
from sslvit.settings.task import DINOSettings, IGPTSettings, MAESettings, SupervisedSettings, TaskSettings
from sslvit.settings.views import VIEW_SETTINGS, ViewSettings

__all__ = [
    "PRESETS",
    "TASK_SETTINGS",
    "VIEW_SETTINGS",
    "DINOSettings",
    "DataSettings",
    "EncoderSettings",
    "IGPTSettings",
    "LogregSettings",
    "MAESettings",
    "OptimSettings",
    "ProbeSettings",
    "RunSettings",
    "SupervisedSettings",
    "TaskSettings",
    "TrainSettings",
    "ViewSettings",
    "preset",
]
