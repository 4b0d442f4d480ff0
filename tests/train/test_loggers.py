"""TensorBoard and Weights & Biases get what metrics.jsonl gets, and a resumed run goes on in the same place."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import yaml
from pytorch_lightning.loggers import Logger, WandbLogger
from run_fixtures import TINY, metrics, run

from sslvit.train import loggers


def test_tensorboard_holds_the_lines_and_the_pictures(shards: Path, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard")
    folder = run(shards, tmp_path / "run", **{"train.tensorboard": True, "train.log_every": 2})
    log = events.EventAccumulator(str(folder.path / "tensorboard"), size_guidance={"images": 0})
    log.Reload()
    lines = folder.read_metrics()
    assert [line["step"] for line in lines] == [2, 4, 6, 7]
    for name in ("train/loss", "lr", "health/rankme", "time/data", "epoch"):  # the same names everywhere
        logged = {event.step: event.value for event in log.Scalars(name)}
        assert logged == pytest.approx({line["step"]: line[name] for line in lines})
    assert set(log.Tags()["images"]) == {file.stem for file in folder.figures.glob("*.png")}
    about = yaml.safe_load((folder.path / "tensorboard" / "hparams.yaml").read_text())  # what two runs are compared by
    assert about["encoder"]["width"] == 16
    assert about["data_set"]["images"] == 30
    assert about["versions"]["torch"] == metadata.version("torch")


def test_no_logger_changes_the_run(shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="no tensorboard")
    plain = run(shards, tmp_path / "plain")
    logged = run(shards, tmp_path / "logged", **{"train.tensorboard": True})
    assert metrics(plain) == metrics(logged)


@pytest.mark.slow
def test_weights_and_biases_offline_and_again_after_a_resume(shards: Path, tmp_path: Path) -> None:
    """In a process of its own, without an account; both parts carry one id."""
    pytest.importorskip("wandb", reason="no wandb")
    words = [sys.executable, "-m", "sslvit.cli", "pretrain", "--config", "mae/digits", "--data", str(shards), "--out",
             str(tmp_path / "run"), "--train.wandb", "ours"]  # fmt: skip
    words += [word for key, value in TINY.items() for word in (f"--{key}", str(value))]
    env = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    subprocess.run([*words, "--train.steps", "4"], check=True, env=env, capture_output=True)
    subprocess.run([*words, "--train.steps", "7", "--resume"], check=True, env=env, capture_output=True)
    name = (tmp_path / "run" / "wandb" / "run-id").read_text().strip()
    parts = [folder.name for folder in (tmp_path / "run" / "wandb").glob("offline-run-*")]
    assert len(parts) == 2
    assert all(part.endswith(name) for part in parts)
    subprocess.run([*words, "--overwrite"], check=True, env=env, capture_output=True)
    assert (tmp_path / "run" / "wandb" / "run-id").read_text().strip() != name


def test_a_run_that_fails_ends_its_log_so_that_the_next_one_has_its_own() -> None:
    ended = []

    class Log(WandbLogger):
        def __init__(self) -> None:
            pass

        experiment = SimpleNamespace(finish=lambda exit_code: ended.append(exit_code))

    trainer = SimpleNamespace(loggers=[Log()])
    with loggers.ended_on_failure(trainer):
        pass
    assert ended == []
    with pytest.raises(KeyboardInterrupt), loggers.ended_on_failure(trainer):
        raise KeyboardInterrupt
    assert ended == [1]


def test_a_logger_that_is_not_installed_is_refused_before_anything_is_written(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value, install in (
        ("wandb", "ours", "wandb"),
        ("tensorboard", True, r"sslvit\[tensorboard\]"),
        ("mlflow", "ours", r"sslvit\[mlflow\]"),
    ):
        monkeypatch.setitem(sys.modules, key, None)
        with pytest.raises(ImportError, match=f"^train.{key}: {key} is not installed. Run: pip install '{install}'$"):
            run(shards, tmp_path / "run", **{f"train.{key}": value})
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_without_weights_and_biases_does_not_import_it(shards: Path, tmp_path: Path) -> None:
    """It stays in the default install because nobody else waits for its import."""
    words = ["pretrain", "--config", "mae/digits", "--data", str(shards), "--out", str(tmp_path / "run")]
    words += [word for key, value in TINY.items() for word in (f"--{key}", str(value))]
    code = f"import sys; from sslvit.cli import main; assert main({words!r}) == 0; assert 'wandb' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


class Recorded(Logger):
    """Stands for Lightning's MLFlowLogger."""

    made: ClassVar[list[Recorded]] = []

    def __init__(
        self, experiment: str, run_name: str, tracking_uri: str | None, save_dir: str, run_id: str | None
    ) -> None:
        super().__init__()
        self.given = (experiment, run_name, tracking_uri, save_dir)
        self.run_id, self.parameters, self.numbers, self.artifacts = run_id or "abc", 0, {}, []
        self.experiment = SimpleNamespace(log_artifact=lambda *words: self.artifacts.append(words))
        self.made.append(self)

    name = version = "recorded"

    def log_hyperparams(self, parameters: dict, *more: Any) -> None:
        self.parameters += 1

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.numbers.setdefault(step, {}).update(metrics)


def test_mlflow_gets_the_lines_and_the_pictures_and_goes_on_in_one_run(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("mlflow")
    module.__spec__ = ModuleSpec("mlflow", None)
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.setattr(loggers, "MLFlowLogger", Recorded)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    Recorded.made.clear()
    folder = run(shards, tmp_path / "run", **{"train.mlflow": "ours"})
    run(shards, tmp_path / "run", resume=True, **{"train.mlflow": "ours", "train.steps": 9})
    first, second = Recorded.made
    assert first.given == ("ours", "run", None, str(folder.path / "mlflow"))
    assert (first.parameters, second.parameters) == (1, 0)  # a parameter of MLflow never changes
    assert second.run_id == "abc" == (folder.path / "mlflow" / "run-id").read_text().strip()
    lines = {line["step"]: line for line in folder.read_metrics()}
    numbers = first.numbers | second.numbers
    assert numbers.keys() == lines.keys()
    for step, line in lines.items():
        assert {"train/loss", "lr", "time/data", "health/rankme"} <= numbers[step].keys() == line.keys() - {"step"}
        assert numbers[step] == pytest.approx({name: line[name] for name in numbers[step]}, rel=1e-6)
    assert {words[1:] for words in first.artifacts} >= {(str(folder.figures / "loss.png"), "figures")}
