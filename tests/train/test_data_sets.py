"""Runs, probes and plans on data sets that are given from Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from run_fixtures import RECIPES, TINY, metrics, read_keys, run, same
from torch.utils.data import Dataset
from torchvision.transforms.functional import to_tensor

import sslvit
from sslvit.cli import main
from sslvit.data.decode import decode_pixels
from sslvit.data.index import load_index
from sslvit.data.reader import ShardReader
from sslvit.tasks import task_class
from sslvit.train.folder import RunFolder


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than these runs."""
    monkeypatch.setattr("sslvit.train.run.plot_pictures", lambda *_: None)


class Noise(Dataset):
    """Gray images of 8 x 8 pixels as tensors from 0 to 1, with labels of three classes."""

    def __init__(self, count: int = 30, seed: int = 0, broken: tuple[int, ...] = ()) -> None:
        source = np.random.default_rng(seed)
        self.labels_of_samples = np.arange(count) % 3
        images = source.integers(0, 90, (count, 8, 8)) + self.labels_of_samples[:, None, None] * 80
        self.images, self.broken = images.astype(np.uint8), broken

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: int) -> Any:
        if item in self.broken:
            raise OSError("the scanner was off")
        return to_tensor(self.images[item]), int(self.labels_of_samples[item])


class FromShards(Dataset):
    """The images of packed shards, in their order."""

    def __init__(self, folder: Path) -> None:
        self.reader = ShardReader(load_index(folder), 1, 0)

    def __len__(self) -> int:
        return len(self.reader.index)

    def __getitem__(self, item: int) -> np.ndarray:
        return decode_pixels(self.reader.read(item), 1)


def pretrained(out: Path, data: Any, recipe: str = "mae/digits", resume: bool = False, **changes: Any) -> RunFolder:
    return sslvit.pretrain(recipe, data, out, resume=resume, **RECIPES[recipe] | changes)


def stopped(out: Path, data: Any, monkeypatch: pytest.MonkeyPatch, at: int = 5, **changes: Any) -> RunFolder:
    """A run that is stopped by Ctrl-C in the middle of a step."""
    task = task_class(changes.get("recipe", "mae/digits").split("/")[0])
    step = task.training_step

    def stop(self, batch, batch_idx=0):
        if self.global_step == at:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(task, "training_step", stop)
        with pytest.raises(KeyboardInterrupt, match=f"interrupted at step {at} of .*sslvit.resume.*, data=...."):
            pretrained(out, data, **changes)
    return RunFolder(out)


@pytest.mark.parametrize("changes", [{}, {"data.memory_limit_mb": 0}, {"recipe": "dino/digits"}], ids=str)
def test_a_run_on_a_data_set_is_the_run_on_its_packed_images(shards: Path, tmp_path: Path, changes: dict) -> None:
    own = pretrained(tmp_path / "own", FromShards(shards), **changes)
    assert same(own, run(shards, tmp_path / "packed", **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data.workers": 2, "data.memory_limit_mb": 0},
        {"train.micro_batch_size": 2, "data.memory_limit_mb": 0},
        {"recipe": "dino/digits"},
    ],
    ids=str,
)
def test_a_stopped_run_resumes_to_the_same_weights_and_metrics(
    tmp_path: Path, changes: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pretrained(tmp_path / "whole", Noise(), **changes)
    cut = stopped(tmp_path / "cut", Noise(), monkeypatch, **changes)
    assert torch.load(cut.checkpoint, weights_only=True)["global_step"] == 3
    assert same(sslvit.resume(cut, data=Noise()), whole)


def test_a_run_says_in_words_what_it_was_given_and_how_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    cut = stopped(tmp_path / "cut", Noise(), monkeypatch)
    words = yaml.safe_load(cut.config.read_text())["data"]["shards"]
    assert words.startswith("Noise of 30 images given from Python (")
    call = f"sslvit.resume('{tmp_path}/cut', data=...)"
    capsys.readouterr()
    assert main(["resume", str(cut.path)]) == 1
    printed = capsys.readouterr().err
    assert f"was given {words}, which no file holds. Resume it from Python with the same: {call}" in printed
    assert main(["pretrain", "--config", str(cut.config), "--out", str(tmp_path / "other")]) == 1
    assert "an object of a Python process, which no file holds" in capsys.readouterr().err
    with pytest.raises(ValueError, match="already exists. To go on with it: sslvit.resume"):
        pretrained(cut.path, Noise())


def test_another_data_set_is_refused_where_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = stopped(tmp_path / "cut", Noise(), monkeypatch)
    before = cut.checkpoint.read_bytes()
    for other in (Noise(seed=1), Noise(count=31)):
        with pytest.raises(ValueError, match="the checkpoint was written with other data .*shards .* then"):
            sslvit.resume(cut, data=other)
    with pytest.raises(ValueError, match="was given Noise of 30 images .* sslvit.resume.*data="):
        sslvit.resume(cut)
    assert cut.checkpoint.read_bytes() == before
    assert pretrained(cut.path, Noise(), resume=True).read_metrics()[-1]["step"] == 7


def test_broken_samples_are_named_counted_and_every_other_is_read_once_an_epoch(tmp_path: Path) -> None:
    changes = {"data.max_unreadable_fraction": 0.1, "data.ledger": True, "train.steps": 9, "data.memory_limit_mb": 0}
    broken = pretrained(tmp_path / "run", Noise(broken=(4, 11)), **changes)
    ledger = json.loads(broken.ledger.read_text())
    assert set(ledger["unreadable_by_reason"]) == {"OSError: the scanner was off"}
    assert {entry["key"] for entry in ledger["unreadable"]} <= {"Noise[4]", "Noise[11]"}
    for keys in read_keys(broken).values():
        assert len(keys) == len(set(keys)) == 24
    with pytest.raises(RuntimeError, match=r"more than data.max_unreadable_fraction .*Noise\[\d+\]: OSError: the scan"):
        pretrained(tmp_path / "many", Noise(broken=(4, 11, 12, 13)))


def test_encoders_are_tuned_scored_and_their_features_taken_on_data_sets(tmp_path: Path) -> None:
    encoder = pretrained(tmp_path / "run", Noise(), **{"train.steps": 2})
    table = sslvit.knn(encoder, Noise(60), Noise(30, seed=1), neighbors=[3], baselines=False, cache=None)
    assert table.rows["encoder"]["kNN, k = 3"] > 60
    found = sslvit.embed(encoder, Noise(broken=(7,)), max_unreadable_fraction=0.1)
    assert found.keys.tolist() == [f"Noise[{n}]" for n in range(30) if n != 7]
    with pytest.raises(ValueError, match="the same images. Scores of images that were trained on say nothing"):
        sslvit.knn(encoder, Noise(60), Noise(60), neighbors=[3])
    with pytest.raises(ValueError, match="list of 2 images .*: no labels, which are needed here. Give samples of"):
        sslvit.knn(encoder, [np.zeros((8, 8), np.uint8)] * 2, Noise())
    tuned = sslvit.finetune(
        encoder, Noise(60), Noise(30, seed=1), out=tmp_path / "tuned",
        **{"data.global_batch_size": 8, "train.steps": 2, "train.accelerator": "cpu", "data.workers": 0},
    )  # fmt: skip
    assert tuned.to_dict()["scores"]["images"] == 30
    assert tuned.to_dict()["scores"]["val"].startswith("Noise of 30 images given from Python")
    with pytest.raises(ValueError, match=r"sslvit.resume\('.*/tuned', data=..., val=...\)"):
        sslvit.resume(tuned)
    assert sslvit.plan("mae/own_images", data=Noise(), memory_gib=8).forecast.run.global_batch_size == 4


def test_scores_during_training_are_of_data_sets_too(tmp_path: Path) -> None:
    online = {"online.train": Noise(60), "online.val": Noise(30, seed=1), "online.every": 4}
    done = pretrained(tmp_path / "run", Noise(), **online)
    assert "probe/knn" in metrics(done)[-1]
    assert yaml.safe_load(done.config.read_text())["online"]["val"].startswith("Noise of 30 images given from Python")


SCRIPT = """
import sys
sys.path[:0] = {paths!r}
import sslvit
from train.test_data_sets import Noise

sslvit.pretrain("mae/digits", Noise(seed={seed}), {out!r}, resume={resume}, **{changes!r})
"""


@pytest.mark.slow
@pytest.mark.smoke
@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
def test_two_ranks_of_a_script_train_as_one(tmp_path: Path, launcher: str) -> None:
    changes = TINY | {"data.memory_limit_mb": 0}
    alone = pretrained(tmp_path / "alone", Noise(), **changes)
    assert scripted(tmp_path, launcher, changes) == (0, "")
    both = RunFolder(tmp_path / "both")
    assert [line["train/loss"] for line in metrics(both)] == pytest.approx(
        [line["train/loss"] for line in metrics(alone)], rel=1e-4
    )


@pytest.mark.slow
@pytest.mark.smoke
def test_ranks_that_are_given_other_data_are_refused(tmp_path: Path) -> None:
    code, text = scripted(tmp_path, "lightning", dict(TINY), seed='int(__import__("os").environ.get("LOCAL_RANK", 0))')
    assert code != 0
    assert "the ranks have other data: each must be given the same images" in text


def scripted(folder: Path, launcher: str, changes: dict, seed: str = "0") -> tuple[int, str]:
    """Exit code of a script that trains on two ranks, and what it says where it fails."""
    root = Path(__file__).parents[2]
    text = SCRIPT.format(
        paths=[str(root), str(root / "tests")], seed=seed, resume=False, out=str(folder / "both"),
        changes=changes | ({"train.devices": 2} if launcher == "lightning" else {}),
    )  # fmt: skip
    (folder / "script.py").write_text(text.replace(f"seed='{seed}'", f"seed={seed}"))
    start = [] if launcher == "lightning" else ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *start, str(folder / "script.py")], env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return done.returncode, done.stderr[-3000:] if done.returncode else ""
