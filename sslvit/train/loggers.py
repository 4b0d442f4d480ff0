"""TensorBoard, Weights & Biases and MLflow besides metrics.jsonl: numbers during the run, pictures at its end."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib.image
import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from sslvit.data.mixture import Index
from sslvit.data.stream import StreamIndex
from sslvit.environment import describe_process, require_packages
from sslvit.files import write_atomically
from sslvit.settings import RunSettings, TrainSettings
from sslvit.train.folder import RunFolder


def check_loggers(settings: TrainSettings) -> None:
    """Refuse trackers that are not installed, before data is touched.

    Raises:
        ImportError: a logger's package is missing.
    """
    if settings.tensorboard:
        require_packages("train.tensorboard", "sslvit[tensorboard]", "tensorboard")
    if settings.wandb is not None:
        require_packages("train.wandb", "wandb", "wandb")
    if settings.mlflow is not None:
        require_packages("train.mlflow", "sslvit[mlflow]", "mlflow")


def make_loggers(
    settings: RunSettings, folder: RunFolder, index: Index | StreamIndex, others: Sequence[Logger] = ()
) -> list[Logger]:
    """The loggers of the settings and of the user, for the first rank; they record everything the run depends on.

    A resumed run continues its run of Weights & Biases and of MLflow, which does not accept a parameter twice.
    """
    train, about = settings.train, describe_run(settings, index)
    loggers: list[Logger] = []
    if train.tensorboard:
        loggers.append(TensorBoardLogger(folder.path, name=None, version=folder.tensorboard.name))
    if train.wandb is not None:
        folder.wandb.mkdir(exist_ok=True)
        file = folder.wandb / "run-id"
        if not file.exists():
            write_atomically(file, uuid.uuid4().hex[:12] + "\n")
        run_id = file.read_text().strip()
        loggers.append(WandbLogger(folder.path.name, folder.path, id=run_id, project=train.wandb, resume="allow"))
    loggers += others
    for logger in loggers:
        logger.log_hyperparams(about)
    if train.mlflow is not None:
        loggers.append(_mlflow(train.mlflow, folder, about))
    return loggers


def _mlflow(experiment: str, folder: RunFolder, about: dict[str, Any]) -> MLFlowLogger:
    """A new or continued run of MLflow, on the server that the environment names or in the run folder."""
    folder.mlflow.mkdir(exist_ok=True)
    file = folder.mlflow / "run-id"
    run_id = file.read_text().strip() if file.exists() else None
    server = os.environ.get("MLFLOW_TRACKING_URI")
    logger = MLFlowLogger(experiment, folder.path.name, server, save_dir=str(folder.mlflow), run_id=run_id)
    if run_id is None:
        logger.log_hyperparams(about)
        write_atomically(file, f"{logger.run_id}\n")
    return logger


def describe_run(settings: RunSettings, index: Index | StreamIndex) -> dict[str, Any]:
    """Settings, data, versions, commits and command as nested dicts, by which runs can be compared."""
    data = {"location": index.location, "images": len(index), "fingerprint": index.fingerprint()}
    return {**asdict(settings), "data_set": data, **describe_process()}


@contextmanager
def ended_on_failure(trainer: pl.Trainer) -> Iterator[None]:
    """End the logs of a run that does not reach its last step, so that the next run in this process has its own."""
    try:
        yield
    except BaseException:
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.finish(exit_code=1)
        raise


def log_pictures(trainer: pl.Trainer, figures: Path, step: int) -> None:
    """Log the run's figures and close each log, on the first rank."""
    files = sorted(figures.glob("*.png"))
    for logger in trainer.loggers:
        for file in files:
            if isinstance(logger, TensorBoardLogger):
                pixels = matplotlib.image.imread(file)[:, :, :3]
                logger.experiment.add_image(file.stem, pixels, step, dataformats="HWC")
            elif isinstance(logger, WandbLogger):
                logger.log_image(file.stem, [str(file)])
            elif isinstance(logger, MLFlowLogger):
                logger.experiment.log_artifact(logger.run_id, str(file), "figures")
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.flush()
        elif isinstance(logger, WandbLogger):
            logger.experiment.finish()
