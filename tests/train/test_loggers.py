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

from sslvit.settings.load import load_recipe
from sslvit.train import loggers
from sslvit.train.run import pretrain


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
    is_away = False  # whether its server does not answer
    last_step = 1000  # after which its server goes away

    def __init__(
        self, experiment: str, run_name: str, tracking_uri: str | None, save_dir: str, run_id: str | None
    ) -> None:
        super().__init__()
        if self.is_away:
            raise ConnectionError("max retries exceeded\nwith url: /api")
        self.is_folder_allowed = os.environ.get("MLFLOW_ALLOW_FILE_STORE") == "true"
        self.given = (experiment, run_name, tracking_uri, save_dir)
        self.run_id, self.parameters, self.numbers, self.artifacts = run_id or "abc", 0, {}, []
        self.experiment = SimpleNamespace(log_artifact=lambda *words: self.artifacts.append(words))
        self.made.append(self)

    name = version = "recorded"

    def log_hyperparams(self, parameters: dict, *more: Any) -> None:
        self.parameters += 1

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if step > self.last_step:
            self.last_step = 0
            raise ConnectionError("max retries exceeded\nwith url: /api")
        self.numbers.setdefault(step, {}).update(metrics)


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> type[Recorded]:
    """A recording MLflow, whether it is installed or not."""
    module = ModuleType("mlflow")
    module.__spec__ = ModuleSpec("mlflow", None)
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.setattr(loggers, "MLFlowLogger", Recorded)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.setenv(name, "")  # is restored after the test
        monkeypatch.delenv(name)
    Recorded.made.clear()
    return Recorded


def test_mlflow_gets_the_lines_and_the_pictures_and_goes_on_in_one_run(
    shards: Path, tmp_path: Path, mlflow: type[Recorded]
) -> None:
    folder = run(shards, tmp_path / "run", **{"train.mlflow": "ours"})
    run(shards, tmp_path / "run", resume=True, **{"train.mlflow": "ours", "train.steps": 9})
    first, second = mlflow.made
    assert first.given == ("ours", "run", None, str(folder.path / "mlflow"))
    assert first.is_folder_allowed  # which MLflow 3 refuses by default
    assert (first.parameters, second.parameters) == (1, 0)  # a parameter of MLflow never changes
    assert second.run_id == "abc" == (folder.path / "mlflow" / "run-id").read_text().strip()
    lines = {line["step"]: line for line in folder.read_metrics()}
    numbers = first.numbers | second.numbers
    assert numbers.keys() == lines.keys()
    for step, line in lines.items():
        assert {"train/loss", "lr", "time/data", "health/rankme"} <= numbers[step].keys() == line.keys() - {"step"}
        assert numbers[step] == pytest.approx({name: line[name] for name in numbers[step]}, rel=1e-6)
    assert {words[1:] for words in first.artifacts} >= {(str(folder.figures / "loss.png"), "figures")}


def test_a_tracker_whose_server_goes_away_is_reported_once_and_the_run_goes_on(
    shards: Path, tmp_path: Path, mlflow: type[Recorded], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(mlflow, "last_step", 3)
    other = mlflow("", "", None, "", None)
    other.last_step = 1000
    changes = TINY | {"data.shards": str(shards), "out": str(tmp_path / "run"), "train.mlflow": "ours"}
    folder = pretrain(load_recipe("mae/digits", changes), loggers=[other])
    gone = mlflow.made[-1]
    assert list(gone.numbers) == [1, 2, 3]
    assert gone.artifacts == []
    assert list(other.numbers) == [line["step"] for line in folder.read_metrics()] == list(range(1, 8))
    said = capsys.readouterr().out
    assert (
        "warning: Recorded: max retries exceeded with url: /api. The run continues without it; metrics.jsonl has the "
        "same numbers\n"
    ) in said
    assert said.count("max retries") == 1


def test_a_tracker_that_does_not_take_a_run_is_an_error_but_one_that_has_taken_it_ends_no_resume(
    shards: Path, tmp_path: Path, mlflow: type[Recorded], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(mlflow, "is_away", True)
    with pytest.raises(
        RuntimeError, match=r"^train\.mlflow ours: MLflow did not accept this run \(max .* url: /api\)\. "
    ):
        run(shards, tmp_path / "run", **{"train.mlflow": "ours"})
    monkeypatch.setattr(mlflow, "is_away", False)
    run(shards, tmp_path / "run", **{"train.mlflow": "ours"})
    monkeypatch.setattr(mlflow, "is_away", True)
    folder = run(shards, tmp_path / "run", resume=True, **{"train.mlflow": "ours", "train.steps": 9})
    assert folder.read_metrics()[-1]["step"] == 9
    assert (
        "warning: MLflow: max retries exceeded with url: /api. The run continues without it" in capsys.readouterr().out
    )


def test_a_resumed_run_goes_on_offline_while_weights_and_biases_is_down(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    class Fake(Recorded):
        """Stands for Lightning's WandbLogger, with a server that is away."""

        def __init__(self, name: str, save_dir: Path, id: str, project: str, resume: str, mode: str = "online") -> None:
            super().__init__(project, name, None, str(save_dir), id)
            self.save_dir, self.version, self.mode, self.numbers = save_dir, id, mode, {}
            self.experiment = SimpleNamespace(finish=self.finish)

        save_dir = version = ""
        is_down = True

        def log_hyperparams(self, parameters: dict, *more: Any) -> None:
            if self.mode == "online" and self.is_down:
                raise ConnectionError("context deadline exceeded")

        def log_image(self, name: str, files: list[str]) -> None:
            pass

        def finish(self) -> None:
            if self.is_down:
                raise TimeoutError("timed out")

    wandb = pytest.importorskip("wandb", reason="no wandb")
    ended = []
    monkeypatch.setattr(wandb, "teardown", lambda: ended.append("its process"))
    monkeypatch.setattr(loggers, "WandbLogger", Fake)
    for name in ("WANDB_FINISH_TIMEOUT", "WANDB_FINISH_TIMEOUT_RAISES"):
        monkeypatch.setenv(name, "")  # is restored after the test
        monkeypatch.delenv(name)
    changes = {"train.wandb": "ours"}
    with pytest.raises(
        RuntimeError, match=r"^train\.wandb ours: Weights & Biases did not accept this run \(context dead"
    ):
        run(shards, tmp_path / "run", **changes)
    Fake.is_down = False
    run(shards, tmp_path / "run", **changes)
    assert os.environ["WANDB_FINISH_TIMEOUT"] == "60"
    Fake.is_down = True
    capsys.readouterr()
    folder = run(shards, tmp_path / "run", resume=True, **changes | {"train.steps": 9})
    offline = Fake.made[-1]
    assert (offline.mode, list(offline.numbers), ended) == ("offline", [8, 9], ["its process"])
    said = capsys.readouterr().out
    sync = f"send what is missing later: wandb sync {folder.path}/wandb/*run-*-{offline.version}\n"
    assert f"warning: Weights & Biases: context deadline exceeded. The run continues offline; {sync}" in said
    assert f"warning: Fake: timed out. The run continues without it; metrics.jsonl has the same numbers; {sync}" in said
