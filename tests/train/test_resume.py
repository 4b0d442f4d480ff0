"""Stopping a run at any place changes nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from run_fixtures import BERT, RECIPES, TINY, metrics, read_keys, run, same, weights

from sslvit.checkpoint import load_encoder
from sslvit.data.array_images import array_samples
from sslvit.data.index import load_index
from sslvit.data.module import ShardDataModule
from sslvit.data.pack import pack
from sslvit.data.plan import EpochPlan
from sslvit.run_plan import RunPlan
from sslvit.settings import DataSettings, EncoderSettings
from sslvit.tasks import task_class
from sslvit.train.folder import RunFolder


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train.micro_batch_size": 2},
        {"data.workers": 2, "data.memory_limit_mb": 0},
        {"recipe": "dino/digits"},
        {"recipe": "dino/digits", "train.micro_batch_size": 2, "task.batch_norm": True},
        {"recipe": "igpt/digits"},
        {"recipe": "igpt/digits", **BERT},
        {"optim.name": "muon"},
    ],
)
def test_a_stopped_run_resumes_to_the_same_weights_and_metrics(
    shards: Path, tmp_path: Path, changes: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(shards, tmp_path / "whole", **changes)
    interrupted(shards, tmp_path / "cut", 5, monkeypatch, **changes)
    assert torch.load(RunFolder(tmp_path / "cut").checkpoint, weights_only=True)["global_step"] == 3
    assert same(run(shards, tmp_path / "cut", resume=True, **changes), whole)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_resume_maps_its_checkpoint_and_lets_go_of_it(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    """Values are read once; a file that is replaced later does not take up room to the end of the run."""
    interrupted(shards, tmp_path / "cut", 5, monkeypatch, recipe=recipe)
    load, loads, files = torch.load, [], []

    def noted(path: Path, map_location: str, **options):
        loads.append((Path(path).name, map_location, options["mmap"]))
        return load(path, map_location, **options)

    def is_mapped() -> bool:
        return str(tmp_path / "cut" / "checkpoints") in Path("/proc/self/maps").read_text()

    task = task_class(recipe.split("/")[0])
    step = task.training_step
    monkeypatch.setattr(task, "on_load_checkpoint", lambda *_: files.append(is_mapped()))
    monkeypatch.setattr(task, "training_step", lambda *given: files.append(is_mapped()) or step(*given))
    monkeypatch.setattr(torch, "load", noted)
    run(shards, tmp_path / "cut", resume=True, recipe=recipe)
    assert loads == [("last.ckpt", "meta", True), ("last.ckpt", "meta", True), ("last.ckpt", "cpu", True)]
    assert files == [True, False, False, False, False]


def interrupted(shards: Path, out: Path, at: int, monkeypatch: pytest.MonkeyPatch, **changes) -> None:
    """A run that is stopped by Ctrl-C in the middle of a step."""
    task = task_class(changes.get("recipe", "mae/digits").split("/")[0])
    step = task.training_step

    def stop(self, batch, batch_idx=0):
        if self.global_step == at:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    monkeypatch.setattr(task, "training_step", stop)
    with pytest.raises(KeyboardInterrupt, match=f"interrupted at step {at} of .*sslvit resume "):
        run(shards, out, **changes)
    monkeypatch.setattr(task, "training_step", step)


def test_a_resume_may_cut_the_batch_in_other_micro_batches(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = {"train.precision": "float64"}
    whole = run(shards, tmp_path / "whole", **base)
    interrupted(shards, tmp_path / "cut", 5, monkeypatch, **base)
    again = run(shards, tmp_path / "cut", resume=True, **base, **{"train.micro_batch_size": 2})
    for one, two in zip(metrics(whole), metrics(again), strict=True):
        assert one["train/loss"] == pytest.approx(two["train/loss"], rel=1e-6)
    for key, value in weights(whole).items():
        torch.testing.assert_close(weights(again)[key], value, rtol=1e-6, atol=1e-8)


def test_a_finished_run_can_be_made_longer(shards: Path, tmp_path: Path) -> None:
    run(shards, tmp_path / "run", **{"train.steps": 4})
    longer = run(shards, tmp_path / "run", resume=True, **{"train.steps": 9})
    assert [line["step"] for line in longer.read_metrics()] == list(range(1, 10))
    assert json.loads((longer.encoder / "encoder.json").read_text())["provenance"]["step"] == 9
    run(shards, tmp_path / "run", resume=True, **{"train.steps": 9})  # nothing left to do, and nothing lost
    assert load_encoder(longer.encoder).settings.width == 16
    assert (longer.figures / "reconstruction.png").exists()
    assert len(longer.read_metrics()) == 9
    with pytest.raises(ValueError, match="is at step 9 already, past 4"):
        run(shards, tmp_path / "run", resume=True, **{"train.steps": 4})


def test_while_a_run_goes_on_its_encoder_is_that_of_the_checkpoint(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(shards, tmp_path / "run", **{"train.steps": 3})
    from sslvit.train import run as module

    monkeypatch.setattr(module, "_finish", lambda *_: None)
    folder = run(shards, tmp_path / "run", resume=True, **{"train.steps": 6})
    state = weights(folder)["model.encoder.blocks.0.attn.qkv.weight"]
    assert torch.equal(load_encoder(folder.path).blocks[0].attn.qkv.weight, state)


def test_a_resume_with_another_encoder_batch_or_data_is_refused(shards: Path, tmp_path: Path) -> None:
    run(shards, tmp_path / "run")
    with pytest.raises(ValueError, match=r"another architecture \(there and here depth: 1 and 2\)"):
        run(shards, tmp_path / "run", resume=True, **{"encoder.depth": 2})
    with pytest.raises(ValueError, match=r"data.global_batch_size was 8 and cannot become 4, since the order.*--init"):
        run(shards, tmp_path / "run", resume=True, **{"data.global_batch_size": 4, "train.steps": 9})
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]["global_batch_size"] == 8
    (tmp_path / "run" / "checkpoints" / "last.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match="last.ckpt: not a readable checkpoint"):
        run(shards, tmp_path / "run", resume=True)


def test_a_resume_on_other_images_or_with_another_seed_is_refused(shards: Path, tmp_path: Path) -> None:
    """As many images of the same size under the same names."""
    folder = run(shards, tmp_path / "run", **{"train.steps": 3})
    before = folder.config.read_text(), folder.checkpoint.read_bytes()
    source = np.random.default_rng(1)
    pixels = source.integers(0, 255, (30, 8, 8)).astype(np.uint8)
    pack(array_samples(pixels, np.arange(30) % 3), tmp_path / "other", ["a", "b", "c"])
    for changes, reason in (
        ({"data.shards": str(tmp_path / "other")}, "was written with other data .shards [0-9a-f]+ then, [0-9a-f]+ now"),
        ({"seed": 1}, "seed was 0 and cannot become 1, since masks, crops and the order of the data follow from it"),
    ):
        with pytest.raises(ValueError, match=reason):
            run(shards, tmp_path / "run", resume=True, **{"train.steps": 6}, **changes)
    assert (folder.config.read_text(), folder.checkpoint.read_bytes()) == before
    shutil.copytree(shards, tmp_path / "moved")
    run(tmp_path / "moved", tmp_path / "run", resume=True, **{"train.steps": 6})  # the same images elsewhere


def test_a_position_holds_only_for_its_order(shards: Path) -> None:
    """Whatever a run's settings say: the checkpoint's own record of images, batch, seed and lanes is compared."""
    index = load_index(shards)

    def at(**changes) -> ShardDataModule:
        plan = EpochPlan(**{"shard_samples": [30], "global_batch_size": 6, "seed": 0, "lanes": 1} | changes)
        module = ShardDataModule(
            index, DataSettings(), EncoderSettings(8, channels=1, patch=2), plan, RunPlan(9, 3, plan.global_batch_size)
        )
        module.trainer = SimpleNamespace(global_step=4)
        return module

    state = at().state_dict()
    same_order = at()
    same_order.load_state_dict(state)
    assert same_order.start_step == 4
    for key, value, name in (
        ("seed", 1, "seed"), ("global_batch_size", 3, "global_batch_size"), ("shard_samples", [24], "samples"),
        ("lanes", 2, "lanes"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"other data .*{name} "):
            at(**{key: value}).load_state_dict(state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task.out_dim": 24}, "do not fit these settings .*task.out_dim 12 -> 24"),
        ({"task.norm_last_layer": False}, "do not fit these settings .*task.norm_last_layer True -> False"),
        (
            {"recipe": "mae/digits", "encoder.pooling": "class"},
            "task.name was dino and cannot become mae, since .*betas",
        ),
    ],
)
def test_a_resume_with_another_task_is_refused_and_changes_nothing(
    shards: Path, tmp_path: Path, changes: dict, message: str
) -> None:
    dino = {"recipe": "dino/digits", "train.steps": 2}
    folder = run(shards, tmp_path / "run", **dino)
    before = folder.config.read_text()
    with pytest.raises(ValueError, match=f"{message}.* --init"):
        run(shards, tmp_path / "run", resume=True, **dino | changes | {"train.steps": 4})
    assert folder.config.read_text() == before
    assert (folder.encoder / "encoder.json").exists()


def test_what_was_chosen_for_a_run_stays_when_it_is_made_longer(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = {"recipe": "dino/digits", "task.momentum": None, "optim.warmup_epochs": None}
    first = yaml.safe_load(run(shards, tmp_path / "run", **options, **{"train.steps": 20}).config.read_text())
    said = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("resolved for 30 images, 8 a step:")
    ]
    assert "task.momentum 0.5" in said[0]
    assert "optim.warmup_epochs 2 steps (0.67 epochs)" in said[0]
    longer = run(shards, tmp_path / "run", resume=True, **options, **{"train.steps": 40})
    second = yaml.safe_load(longer.config.read_text())
    assert (second["task"], second["optim"]) == (first["task"], first["optim"])
    assert first["task"]["momentum"] == 0.5  # an average over a tenth of 20 updates
    fresh = yaml.safe_load(run(shards, tmp_path / "new", **options, **{"train.steps": 40}).config.read_text())
    assert fresh["task"]["momentum"] == 0.75


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=pytest.mark.smoke if name == "mae/digits" else ()) for name in RECIPES]
)
def test_kill_at_any_step_and_resume_is_bit_identical(shards: Path, tmp_path: Path, recipe: str) -> None:
    changes = [f"--{k}={json.dumps(v)}" for k, v in (RECIPES[recipe] | {"train.steps": 60, "train.threads": 1}).items()]
    command = [
        sys.executable,
        "-m",
        "sslvit.cli",
        "pretrain",
        "--config",
        recipe,
        "--data",
        str(shards),
        *changes,
    ]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([*command, "--out", str(tmp_path / "whole")], check=True, env=env)
    cut = RunFolder(tmp_path / "cut")
    resume: list[str] = []
    kills = 0
    for wanted in (7, 20, 41):
        process = subprocess.Popen([*command, "--out", str(cut.path), *resume], env=env)
        while process.poll() is None and (len(cut.read_metrics()) if cut.metrics.exists() else 0) < wanted:
            time.sleep(0.01)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        resume = ["--resume"]
    subprocess.run([*command, "--out", str(cut.path), "--resume"], check=True, env=env)
    assert kills == 3
    assert same(cut, RunFolder(tmp_path / "whole"))


@pytest.mark.slow
def test_a_killed_run_resumed_on_other_ranks_reads_exactly_what_was_left(shards: Path, tmp_path: Path) -> None:
    """kill -9 on two ranks, then one rank, killed again, then three: every epoch reads each sample once."""
    options = TINY | {
        "data.ledger": True, "data.global_batch_size": 6, "train.checkpoint_every": 2, "train.steps": 60,
        "data.workers": 1,
        "data.memory_limit_mb": 0, "data.lanes": 2, "data.window_shards": 1,
    }  # fmt: skip
    command = [sys.executable, "-m", "sslvit.cli", "pretrain", "--config", "mae/digits", "--data", str(shards)]
    command += [f"--{key}={json.dumps(value)}" for key, value in options.items()] + ["--out", str(tmp_path / "run")]
    folder = RunFolder(tmp_path / "run")
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    resume: list[str] = []
    kills = 0
    for ranks, wanted in ((2, 9), (1, 25), (3, 99)):
        process = subprocess.Popen(
            [*command, *resume, f"--train.devices={ranks}"], env=env, start_new_session=True, stdout=subprocess.DEVNULL
        )
        while process.poll() is None and (len(folder.read_metrics()) if folder.metrics.exists() else 0) < wanted:
            time.sleep(0.01)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
        resume = ["--resume"]
    assert kills == 2
    assert process.returncode == 0
    keys = read_keys(folder)
    assert sorted(keys) == list(range(12))
    for epoch, read in keys.items():
        assert len(read) == len(set(read)) == 30, epoch
