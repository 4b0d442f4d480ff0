"""What a YAML may say. Importing this package imports no torch."""

from sslvit.settings.data import DataSettings
from sslvit.settings.dino import DINOSettings
from sslvit.settings.encoder import EncoderSettings
from sslvit.settings.igpt import IGPTSettings
from sslvit.settings.mae import MAESettings
from sslvit.settings.optim import OptimSettings
from sslvit.settings.presets import PRESETS, preset
from sslvit.settings.probe import ProbeSettings
from sslvit.settings.protocols import LogregSettings
from sslvit.settings.run import TASK_SETTINGS, RunSettings
from sslvit.settings.supervised import SupervisedSettings
from sslvit.settings.task import TaskSettings
from sslvit.settings.train import TrainSettings
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
