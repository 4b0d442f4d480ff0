"""One pretraining run: the record that a recipe in configs/ fills in."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from sslvit.files import expand_path
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


@dataclass
class RunSettings:
    """Everything that decides a run's result.

    Args:
        task: the pretext task; its name picks the keys.
        encoder: what is trained.
        data: what it is trained on.
        optim: how weights move.
        train: how long, on what.
        online: what labels say while it trains.
        seed: of the weights, the order of the data, the crops and the masks.
        out: the run folder.
        init: an encoder to start from instead of random weights.
    """

    task: TaskSettings = field(default_factory=MAESettings)
    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    data: DataSettings = field(default_factory=DataSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    online: OnlineSettings = field(default_factory=OnlineSettings)
    seed: int = 0
    out: str = "runs/new"
    init: str | None = None

    def __post_init__(self) -> None:
        self.out = expand_path(self.out)
        self.init = self.init and expand_path(self.init)
        if self.seed < 0:
            raise ValueError(f"seed: {self.seed} is negative. Use 0 or more.")

    def as_dict(self) -> dict:
        """Plain dicts, lists, strings and numbers, as YAML and checkpoints take them."""
        return asdict(self)
