"""Runs on part of a data set: `data.limit` and `data.limit_per_class`."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from run_fixtures import TINY, command, read_keys, run, run_ranks, same

import sslvit
from sslvit.cli import main
from sslvit.data.index import load_index


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than these runs."""
    monkeypatch.setattr("sslvit.train.run.plot_pictures", lambda *_: None)


def test_a_run_reads_the_images_of_its_limit_and_goes_on_with_no_other(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["--data.limit=16", "--data.ledger=true"]
    assert main([*command(shards, tmp_path / "run", *words)[3:]]) == 0
    said = capsys.readouterr().out
    assert f"{shards}: data.limit: 16 of 30 images, drawn by the seed (0)" in said
    assert "on 16 images; 7 steps of 8 images (3.5 epochs" in said
    folder = tmp_path / "run"
    assert yaml.safe_load((folder / "config.yaml").read_text())["data"]["limit"] == 16
    keys = read_keys(sslvit.resume(folder, **{"train.steps": 8}))
    index = load_index(shards)
    assert set(keys[0]) == set(keys[1]) == set(keys[3])
    assert set(keys[0]) < {index.key(sample) for sample in range(30)}
    assert main(["resume", str(folder), "--data.limit", "24"]) == 1
    assert "data.limit was 16 and cannot become 24, since the images were drawn with it" in capsys.readouterr().err


def test_fine_tuning_takes_so_many_images_of_each_class(shards: Path, tmp_path: Path) -> None:
    encoder = run(shards, tmp_path / "encoder", **{"train.steps": 1})
    tuned = sslvit.finetune(
        encoder, shards, shards, out=tmp_path / "tuned",
        **{"data.limit_per_class": 3, "data.global_batch_size": 3, "data.workers": 0, "data.ledger": True,
           "train.steps": 3, "train.accelerator": "cpu", "task.allow_same_data": True},
    )  # fmt: skip
    index = load_index(shards)
    label_of = {index.key(sample): int(index.labels_of(slice(None))[sample]) for sample in range(30)}
    keys = read_keys(tuned)[0]
    assert sorted(label_of[key] for key in keys) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert tuned.to_dict()["scores"]["images"] == 30
    with pytest.raises(ValueError, match="the same images. Scores of images that were trained on"):
        sslvit.finetune(encoder, shards, shards, out=tmp_path / "other", **{"data.limit_per_class": 3})


def test_a_plan_counts_the_images_of_the_limit(shards: Path) -> None:
    limits = [{}, {"data.limit": 16}, {"data.limit_per_class": 4}]
    steps = [sslvit.plan("mae/digits", shards, tflops=1.0, **TINY | {"train.steps": None, "train.epochs": 1} | limit)
             for limit in limits]  # fmt: skip
    assert [found.forecast.run.total_steps for found in steps] == [3, 2, 1]


@pytest.mark.slow
@pytest.mark.smoke
def test_two_ranks_draw_the_same_images(shards: Path, tmp_path: Path) -> None:
    changes = {"data.limit": 16, "data.ledger": True}
    alone = run(shards, tmp_path / "alone", **changes)
    both = run_ranks(shards, tmp_path / "both", **changes, **{"train.devices": 2})
    one, two = read_keys(alone), read_keys(both)
    assert {epoch: set(keys) for epoch, keys in one.items()} == {epoch: set(keys) for epoch, keys in two.items()}
    assert same(run(shards, tmp_path / "again", **changes), alone)
