"""TensorBoard, Weights & Biases and MLflow besides metrics.jsonl: numbers during the run, pictures at its end.

A tracker that does not accept a new run is an error before the first step, since a key or an address may be wrong.
Later, no tracker ends the run: its first error becomes a warning, and the run continues without it.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.image
import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from sslvit.data.mixture import Index
from sslvit.data.stream import StreamIndex
from sslvit.environment import describe_process, require_packages
from sslvit.files import printable, write_atomically
from sslvit.settings import RunSettings, TrainSettings
from sslvit.train.folder import RunFolder

logger = logging.getLogger(__name__)

NAMES = {TensorBoardLogger: "TensorBoard", WandbLogger: "Weights & Biases", MLFlowLogger: "MLflow"}
CALLS = ("log_metrics", "log_hyperparams", "log_graph", "save", "finalize")  # by Lightning and by callbacks
HAS_FAILED = "has_failed_in_run"  # attribute of a tracker after its first error
WITHOUT_IT = "The run continues without it; metrics.jsonl has the same numbers"


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

    Raises:
        RuntimeError: Weights & Biases or MLflow does not accept a new run.
    """
    train, about = settings.train, describe_run(settings, index)
    trackers: list[Logger] = []
    if train.tensorboard:
        trackers.append(TensorBoardLogger(folder.path, name=None, version=folder.tensorboard.name))
    trackers += others
    for tracker in trackers:
        tracker.log_hyperparams(about)
    if train.wandb is not None:
        trackers.append(_wandb(train.wandb, folder, about))
    if train.mlflow is not None:
        trackers += _mlflow(train.mlflow, folder, about)
    for tracker in trackers:
        setattr(tracker, HAS_FAILED, False)  # of an earlier run
        for name in CALLS:
            setattr(tracker, name, partial(_call, tracker, getattr(tracker, name)))
    return trackers


def _wandb(project: str, folder: RunFolder, about: dict[str, Any]) -> WandbLogger:
    """A new or continued run of Weights & Biases; a continued one is logged offline while the server is away."""
    # by default the end of a run waits for the server without end, and a job that was told to stop is not requeued
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", "60")
    os.environ.setdefault("WANDB_FINISH_TIMEOUT_RAISES", "true")
    folder.wandb.mkdir(exist_ok=True)
    file = folder.wandb / "run-id"
    is_new = not file.exists()
    run_id = uuid.uuid4().hex[:12] if is_new else file.read_text().strip()

    def begin(**mode: Any) -> WandbLogger:
        tracker = WandbLogger(folder.path.name, folder.path, id=run_id, project=project, resume="allow", **mode)
        tracker.log_hyperparams(about)
        return tracker

    try:
        tracker = begin()
    except Exception as error:
        if is_new:
            raise RuntimeError(
                f"train.wandb {project}: Weights & Biases did not accept this run ({_reason(error)}). Check "
                "WANDB_API_KEY (wandb login) and WANDB_BASE_URL, or set WANDB_MODE=offline and send the run later with "
                "wandb sync."
            ) from error
        import wandb

        wandb.teardown()  # its process still holds the run
        tracker = begin(mode="offline")
        logger.warning(f"Weights & Biases: {_reason(error)}. The run continues offline{_sync_hint(tracker)}")
    if is_new:
        write_atomically(file, run_id + "\n")
    return tracker


def _mlflow(experiment: str, folder: RunFolder, about: dict[str, Any]) -> list[Logger]:
    """A new or continued run of MLflow, on the server that the environment names or in the run folder.

    Empty if the server of a continued run is away.
    """
    # of eight attempts, during which other ranks wait; the default of 120 s exceeds train.timeout_seconds
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    folder.mlflow.mkdir(exist_ok=True)
    file = folder.mlflow / "run-id"
    run_id = file.read_text().strip() if file.exists() else None
    server = os.environ.get("MLFLOW_TRACKING_URI")
    if not server:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # newer versions refuse to log into a folder otherwise
    try:
        tracker = MLFlowLogger(experiment, folder.path.name, server, save_dir=str(folder.mlflow), run_id=run_id)
        if run_id is None:
            tracker.log_hyperparams(about)
            write_atomically(file, f"{tracker.run_id}\n")
        _ = tracker.experiment  # connects to the server
    except Exception as error:
        if run_id is None:
            raise RuntimeError(
                f"train.mlflow {experiment}: MLflow did not accept this run ({_reason(error)}). Check that "
                "the server of MLFLOW_TRACKING_URI is up and accepts your key, or leave out train.mlflow: "
                "metrics.jsonl has the same numbers."
            ) from error
        logger.warning(f"MLflow: {_reason(error)}. {WITHOUT_IT}")
        return []
    return [tracker]


def _call(tracker: Logger, method: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Call a method of a tracker that has not failed yet."""
    if not getattr(tracker, HAS_FAILED, False):
        with _errors_as_warnings(tracker):
            method(*args, **kwargs)


@contextmanager
def _errors_as_warnings(tracker: Logger) -> Iterator[None]:
    """Turn a tracker's first error into a warning, and ignore later ones."""
    try:
        yield
    except Exception as error:
        if getattr(tracker, HAS_FAILED, False):
            return
        setattr(tracker, HAS_FAILED, True)
        name = NAMES.get(type(tracker), type(tracker).__name__)
        logger.warning(f"{name}: {_reason(error)}. {WITHOUT_IT}{_sync_hint(tracker)}")


def _reason(error: Exception) -> str:
    """An error on one line."""
    return printable(" ".join(str(error).split()) or type(error).__name__, 200).rstrip(".")


def _sync_hint(tracker: Logger) -> str:
    """How to send later what the tracker's server lacks, if that is possible."""
    if not isinstance(tracker, WandbLogger):
        return ""
    return f"; send what is missing later: wandb sync {tracker.save_dir}/wandb/*run-*-{tracker.version}"


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
        for tracker in trainer.loggers:
            if isinstance(tracker, WandbLogger):
                with _errors_as_warnings(tracker):
                    tracker.experiment.finish(exit_code=1)
        raise


def log_pictures(trainer: pl.Trainer, figures: Path, step: int) -> None:
    """Log the run's figures and close each log, on the first rank."""
    for tracker in trainer.loggers:
        _call(tracker, _log_pictures, tracker, sorted(figures.glob("*.png")), step)
        if isinstance(tracker, WandbLogger):
            with _errors_as_warnings(tracker):
                tracker.experiment.finish()


def _log_pictures(tracker: Logger, files: list[Path], step: int) -> None:
    for file in files:
        if isinstance(tracker, TensorBoardLogger):
            pixels = matplotlib.image.imread(file)[:, :, :3]
            tracker.experiment.add_image(file.stem, pixels, step, dataformats="HWC")
        elif isinstance(tracker, WandbLogger):
            tracker.log_image(file.stem, [str(file)])
        elif isinstance(tracker, MLFlowLogger):
            tracker.experiment.log_artifact(tracker.run_id, str(file), "figures")
    if isinstance(tracker, TensorBoardLogger):
        tracker.experiment.flush()
