"""Beside metrics.jsonl: TensorBoard and Weights & Biases, by flag; numbers as they come, pictures at the end."""

from __future__ import annotations

import uuid
from pathlib import Path

import matplotlib.image
import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger

from sslvit.environment import require_packages
from sslvit.files import write_atomically
from sslvit.settings import TrainSettings
from sslvit.train.folder import RunFolder


def check_loggers(settings: TrainSettings) -> None:
    """Refuse what is not installed, before data is touched.

    Raises:
        ImportError: a logger's package is missing.
    """
    if settings.tensorboard:
        require_packages("train.tensorboard", "sslvit[tensorboard]", "tensorboard")
    if settings.wandb is not None:
        require_packages("train.wandb", "wandb", "wandb")


def make_loggers(settings: TrainSettings, folder: RunFolder) -> list[Logger]:
    """Those that the settings ask for, on the first rank. A resumed run goes on in the same run of Weights & Biases."""
    loggers: list[Logger] = []
    if settings.tensorboard:
        loggers.append(TensorBoardLogger(folder.path, name=None, version=folder.tensorboard.name))
    if settings.wandb is not None:
        folder.wandb.mkdir(exist_ok=True)
        file = folder.wandb / "run-id"
        if not file.exists():
            write_atomically(file, uuid.uuid4().hex[:12] + "\n")
        given = {"project": settings.wandb, "id": file.read_text().strip(), "resume": "allow"}
        loggers.append(WandbLogger(folder.path.name, folder.path, **given))
    return loggers


def log_line(trainer: pl.Trainer, line: dict[str, float]) -> None:
    """A line of metrics.jsonl, on the first rank."""
    numbers = {name: value for name, value in line.items() if name != "step"}
    for logger in trainer.loggers:
        logger.log_metrics(numbers, step=int(line["step"]))


def log_pictures(trainer: pl.Trainer, figures: Path, step: int) -> None:
    """The run's figures, and the end of each log, on the first rank."""
    files = sorted(figures.glob("*.png"))
    for logger in trainer.loggers:
        for file in files:
            if isinstance(logger, TensorBoardLogger):
                pixels = matplotlib.image.imread(file)[:, :, :3]
                logger.experiment.add_image(file.stem, pixels, step, dataformats="HWC")
            elif isinstance(logger, WandbLogger):
                logger.log_image(file.stem, [str(file)])
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.flush()
        elif isinstance(logger, WandbLogger):
            logger.experiment.finish()
