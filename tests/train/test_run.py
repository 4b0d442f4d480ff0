"""A run on a CPU, and what it leaves behind."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from run_fixtures import BERT, RECIPES, TINY, command, metrics, read_keys, run, same, weights

import sslvit
from sslvit.checkpoint import load_encoder
from sslvit.data.array_images import array_samples
from sslvit.data.pack import pack
from sslvit.train.folder import RunFolder


def test_a_run_leaves_everything_in_its_folder(shards: Path, tmp_path: Path) -> None:
    folder = run(shards, tmp_path / "run")
    lines = folder.read_metrics()
    assert [line["step"] for line in lines] == list(range(1, 8))
    assert {"step", "epoch", "train/loss", "lr", "train/grad_norm", "time/images_per_second"} <= lines[0].keys()
    assert lines[0]["lr"] == 0  # the first update of a warm-up
    assert lines[2]["epoch"] == 1.0  # 30 images, 8 a step, 6 dropped
    assert (folder.figures / "loss.png").stat().st_size > 1000
    assert (folder.figures / "reconstruction.png").stat().st_size > 1000
    ledger = json.loads(folder.ledger.read_text())
    assert (ledger["samples_read"], ledger["epochs_finished"], ledger["unreadable"]) == (56, 2, [])
    config = yaml.safe_load(folder.config.read_text())
    assert config["encoder"]["width"] == 16
    assert config["data"]["view"]["scale"] == [0.5, 1.0]
    encoder, last = load_encoder(tmp_path / "run"), load_encoder(folder.checkpoint)
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(encoder.features(images), last.features(images))
    assert json.loads((folder.encoder / "encoder.json").read_text())["provenance"]["step"] == 7


def test_lightning_warns_of_nothing_in_a_run(shards: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(shards, tmp_path / "run", **{"train.steps": 2, "train.micro_batch_size": 4})
    assert [str(warning.message) for warning in caught if "lightning" in warning.filename] == []


def test_the_same_settings_give_the_same_run_and_another_seed_another(shards: Path, tmp_path: Path) -> None:
    one, two, other = (run(shards, tmp_path / n, seed=s) for n, s in (("a", 0), ("b", 0), ("c", 1)))
    assert same(one, two)
    assert not same(one, other)


@pytest.mark.parametrize(("recipe", "special"), [*((recipe, {}) for recipe in RECIPES), ("igpt/digits", BERT)])
def test_micro_batches_and_workers_leave_the_run_as_it_is(
    shards: Path, tmp_path: Path, recipe: str, special: dict
) -> None:
    base = {"train.precision": "float64", "train.steps": 5, "recipe": recipe} | special
    plain = run(shards, tmp_path / "plain", **base)
    for i, changes in enumerate(({"train.micro_batch_size": 2}, {"data.workers": 1, "data.memory_limit_mb": 0})):
        other = run(shards, tmp_path / f"other{i}", **base, **changes)
        for one, two in zip(metrics(plain), metrics(other), strict=True):
            assert one == pytest.approx(two, rel=1e-6)
        for key, value in weights(plain).items():
            torch.testing.assert_close(weights(other)[key], value, rtol=1e-6, atol=1e-8)


def test_a_model_of_pixels_logs_nats_and_bits_and_draws(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = run(shards, tmp_path / "run", recipe="igpt/digits", **{"train.steps": 2})
    last = folder.read_metrics()[-1]
    assert last["train/bits"] == pytest.approx(last["train/loss"] / math.log(2))
    assert {"health/feature_std", "health/rankme"} <= last.keys()
    assert f"loss {last['train/loss']:.4f} ({last['train/bits']:.4f} bits)" in capsys.readouterr().out
    assert {"generated.png", "completed.png", "loss.png"} <= {path.name for path in folder.figures.iterdir()}
    filled = run(shards, tmp_path / "bert", recipe="igpt/digits", **BERT, **{"train.steps": 2})
    assert (filled.figures / "filled.png").exists()


def test_the_teacher_moves_once_per_update_as_written_in_the_paper(shards: Path, tmp_path: Path) -> None:
    """Its weights after each update, from the student's: not once more for every micro-batch."""
    seen = []
    from sslvit.tasks.dino import DINO

    class Watched(DINO):
        def optimizer_step(self, *args, **kwargs) -> None:
            before = [p.clone() for p in self.model.teacher.parameters()]
            super().optimizer_step(*args, **kwargs)
            share = self.momentum_at(len(seen))
            pairs = zip(before, self.encoder.parameters(), self.model.teacher.parameters(), strict=True)
            seen.append(max(float((share * b + (1 - share) * s - t).abs().max()) for b, s, t in pairs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sslvit.tasks.task_class", lambda name: Watched)
        folder = run(shards, tmp_path / "run", recipe="dino/digits", **{"train.micro_batch_size": 2})
    assert len(seen) == 7
    assert max(seen) < 1e-6
    state = weights(folder)
    assert not torch.equal(state["model.teacher.cls_token"], state["model.encoder.cls_token"])
    assert state["model.center"].abs().max() > 0
    assert torch.equal(load_encoder(folder.path).cls_token, state["model.teacher.cls_token"])


def test_folders_are_not_overwritten_silently(shards: Path, tmp_path: Path) -> None:
    run(shards, tmp_path / "run")
    with pytest.raises(ValueError, match=r"already exists. To go on with it: sslvit resume .*Or pass --overwrite"):
        run(shards, tmp_path / "run")
    with pytest.raises(ValueError, match="exclude each other"):
        run(shards, tmp_path / "run", resume=True, overwrite=True)
    with pytest.raises(ValueError, match="has no checkpoint"):
        run(shards, tmp_path / "new", resume=True)
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "mine" / "config.yaml").write_text("mine: too")
    with pytest.raises(ValueError, match="not a run folder"):
        run(shards, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()
    (tmp_path / "run" / "notes.txt").write_text("my own notes")
    assert len(run(shards, tmp_path / "run", overwrite=True, **{"train.steps": 2}).read_metrics()) == 2
    assert (tmp_path / "run" / "notes.txt").exists()


def test_impossible_runs_stop_before_anything_is_made(shards: Path, tmp_path: Path) -> None:
    for changes, message in [
        ({"data.global_batch_size": 31}, "more than the 30 samples"),
        ({"train.micro_batch_size": 3}, "must divide the .* images of each rank"),
        ({"data.shards": str(tmp_path / "none")}, "is not a folder"),
        ({"init": str(tmp_path / "none")}, "no such file or folder"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run(shards, tmp_path / "run", **changes)
        assert not (tmp_path / "run").exists()


def test_a_run_starts_from_another_encoder(shards: Path, tmp_path: Path) -> None:
    first = run(shards, tmp_path / "first")
    changes = {"train.steps": 1, "seed": 5, "optim.base_lr": 0.0}
    second = run(shards, tmp_path / "second", init=str(tmp_path / "first"), **changes)
    start = load_encoder(tmp_path / "first").state_dict()
    after = load_encoder(tmp_path / "second").state_dict()
    assert all(torch.equal(start[k], after[k]) for k in start)  # one step at rate zero
    assert second.path != first.path
    with pytest.raises(ValueError, match="another architecture"):
        run(shards, tmp_path / "third", init=str(tmp_path / "first"), **{"encoder.width": 32})


@pytest.mark.parametrize("memory", [0, 1024])
def test_images_of_more_pixels_than_are_allowed_are_unreadable(shards: Path, tmp_path: Path, memory: int) -> None:
    limits = {"data.max_pixels": 63, "data.memory_limit_mb": memory}
    with pytest.raises(RuntimeError, match=r"8 x 8 pixels, more than 63 \(data.max_pixels\)"):
        run(shards, tmp_path / "run", **limits)


def test_an_image_folder_is_packed_once_for_all_runs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from PIL import Image

    cache = {"data.cache": str(tmp_path / "cache")}
    (tmp_path / "photos").mkdir()
    for i in range(10):
        Image.fromarray(np.full((9 + i, 8), 20 * i, np.uint8)).save(tmp_path / "photos" / f"{i}.png")
    run(tmp_path / "photos", tmp_path / "run", **cache)
    assert "an image folder; packing it into" in capsys.readouterr().out
    run(tmp_path / "photos", tmp_path / "second", **cache)
    assert "using its shards packed earlier in" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "photos", "run", "second"]


@pytest.mark.parametrize(("limit", "stops"), [(0.01, True), (0.5, False)])
def test_bad_samples_are_counted_and_stop_the_run_only_above_the_limit(
    shards: Path, tmp_path: Path, limit: float, stops: bool
) -> None:
    from sslvit.data.index import load_index

    index = load_index(shards)
    for sample in (3, 4, 5):
        shard, offset, size = index.locate(sample)
        with open(index.shard_path(shard), "r+b") as file:
            file.seek(offset)
            file.write(bytes(size))
    if stops:
        with pytest.raises(
            RuntimeError, match=r"unreadable samples are more than data.max_unreadable_fraction \(1.0% of 30"
        ):
            run(shards, tmp_path / "run", **{"data.max_unreadable_fraction": limit})
    else:
        run(shards, tmp_path / "run", **{"data.max_unreadable_fraction": limit})
    unreadable = json.loads((tmp_path / "run" / "ledger.json").read_text())["unreadable"]
    assert {entry["reason"] for entry in unreadable} == {"not an image (UnidentifiedImageError)"}
    assert all(entry["key"].startswith("shard-000000.tar/0000") for entry in unreadable)


def test_the_python_door(shards: Path, tmp_path: Path) -> None:
    folder = sslvit.pretrain("mae/digits", data=shards, out=tmp_path / "run", **TINY)
    assert sslvit.load_encoder(folder.path)(torch.randn(1, 1, 8, 8)).shape == (1, 17, 16)


def test_the_ledger_names_each_sample_once_per_epoch_also_after_a_resume(shards: Path, tmp_path: Path) -> None:
    options = {
        "data.ledger": True,
        "data.global_batch_size": 6,
        "train.micro_batch_size": 3,
        "train.checkpoint_every": 4,
    }
    whole = run(shards, tmp_path / "whole", **options, **{"train.steps": 10})
    run(shards, tmp_path / "cut", **options, **{"train.steps": 6})
    line = json.dumps({"step": 6, "epoch": 1, "key": "of a step that the checkpoint does not know"})
    with open(tmp_path / "cut" / "ledger" / "rank-00000.jsonl", "a") as file:
        file.write(line + "\n" + line[:20])
    cut = run(shards, tmp_path / "cut", resume=True, **options, **{"train.steps": 10})
    for folder in (whole, cut):
        keys = read_keys(folder)
        assert [len(set(keys[epoch])) for epoch in (0, 1)] == [len(keys[epoch]) for epoch in (0, 1)] == [30, 30]
    assert read_keys(whole) == read_keys(cut)
    ledger = json.loads(whole.ledger.read_text())
    assert (ledger["samples_read"], ledger["epochs_finished"], ledger["dropped_per_epoch"]) == (60, 2, 0)
    again = run(shards, tmp_path / "cut", overwrite=True, **options, **{"train.steps": 5})
    assert len(read_keys(again)) == 1


def test_a_mixture_and_several_resolutions_train(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    other = pack(array_samples(np.full((12, 8, 8), 99, np.uint8)), tmp_path / "other")
    options = {
        "data.shards": None, "data.mixture": {str(shards): 3, other.location: 1}, "data.resolutions": [8, 12, 16],
        "data.ledger": True,
    }  # fmt: skip
    folder = run(shards, tmp_path / "run", **options)
    assert len(folder.read_metrics()) == 7
    keys = [key for epoch in read_keys(folder).values() for key in epoch]
    assert sum(key.startswith(other.location) for key in keys) == 7 * 2
    assert sum(key.startswith(str(shards)) for key in keys) == 7 * 6
    assert sslvit.load_encoder(folder.path).settings.image_size == [8, 8]
    with pytest.raises(ValueError, match="data.resolutions: 9 is not a multiple of encoder.patch"):
        run(shards, tmp_path / "new", **{"data.resolutions": [9]})


def test_more_loader_processes_than_cores_are_said_in_our_words(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A scheduler that gives each task one core is a common mistake."""
    said = "data.workers: 2 loader processes on each rank, but this one may use 1 CPU core. Lower it"
    for cores, is_said in ((1, True), (2, False)):
        monkeypatch.setattr("sslvit.train.run.cpu_cores", lambda cores=cores: cores)
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            run(shards, tmp_path / str(cores), **{"data.workers": 2, "data.memory_limit_mb": 0, "train.steps": 2})
        assert (said in capsys.readouterr().out) is is_said
        assert not [one for one in found if "worker processes" in str(one.message)]


def test_a_stream_trains_for_a_fixed_number_of_steps(tmp_path: Path) -> None:
    import io
    import tarfile

    from PIL import Image

    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        for i in range(20):
            buffer = io.BytesIO()
            Image.fromarray(np.full((8, 8), i, np.uint8)).save(buffer, "PNG")
            about = tarfile.TarInfo(f"{i}.png")
            about.size = len(buffer.getvalue())
            tar.addfile(about, io.BytesIO(buffer.getvalue()))
    options = {"data.stream_samples": 20, "data.workers": 1}
    folder = run(tmp_path / "x.tar.gz", tmp_path / "run", **options)
    assert len(folder.read_metrics()) == 7
    assert (folder.figures / "reconstruction.png").exists()
    resumed = run(tmp_path / "x.tar.gz", tmp_path / "run", resume=True, **options, **{"train.steps": 9})
    assert [line["step"] for line in resumed.read_metrics()] == list(range(1, 10))
    with pytest.raises(ValueError, match="data.resolutions: the images of a stream have one size"):
        run(tmp_path / "x.tar.gz", tmp_path / "new", **options, **{"data.resolutions": [8]})
    with pytest.raises(ValueError, match="data.ledger: a stream cannot promise each sample once"):
        run(tmp_path / "x.tar.gz", tmp_path / "new", **options, **{"data.ledger": True})


def test_data_that_does_not_fit_is_refused_before_the_first_step(shards: Path, tmp_path: Path) -> None:
    six = pack(array_samples(np.zeros((9, 8, 8, 6), np.uint8)), tmp_path / "six")
    with pytest.raises(ValueError, match="encoder.channels: 1, but the images of .*six have 6"):
        run(six.location, tmp_path / "run")
    tied = "data.resolutions: a pixel sequence with encoder.pos_embed learned_1d is tied to its size"
    learned = {"data.resolutions": [8, 4], "encoder.pos_embed": "learned_1d"}
    with pytest.raises(ValueError, match=tied):
        run(shards, tmp_path / "run", recipe="igpt/digits", **learned)
    path = shards / "shard-000000.tar"
    path.rename(shards / "moved")
    with pytest.raises(ValueError, match=r"1 shards cannot be read, 30 of 30 samples .shard-000000.tar: missing shard"):
        run(shards, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_unreachable_server_ends_the_run_in_one_line(shards: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """Also from a loader process, whose exceptions bring their whole traceback along."""
    import functools
    import http.server
    import threading

    from sslvit.cli import main
    from sslvit.data import remote

    monkeypatch.setattr(remote.ShardCache.__init__, "__defaults__", (200, 2, 0.01, 1.0))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(shards))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    options = TINY | {"data.cache": str(tmp_path / "cache"), "data.memory_limit_mb": 0}
    words = [f"--{key}={json.dumps(value)}" for key, value in options.items()]
    command = ["pretrain", "--config", "mae/digits", "--data", address, *words]
    assert main([*command, "--out", str(tmp_path / "fine")]) == 0
    assert same(RunFolder(tmp_path / "fine"), run(shards, tmp_path / "local", **{"data.memory_limit_mb": 0}))
    assert main([*command, "--out", str(tmp_path / "small"), "--data.cache_gb=1e-6"]) == 1
    assert "data.cache_gb: 1e-06 GB cannot hold the shards that each machine reads" in capsys.readouterr().err
    assert not (tmp_path / "small").exists()
    for path in (tmp_path / "cache").glob("??/*.tar"):
        path.unlink()
    original = remote.ShardCache.get
    elsewhere = "http://127.0.0.1:1/x"

    def get(cache: remote.ShardCache, address: str, *length_and_digest, **options) -> Path:
        return original(cache, elsewhere if address.endswith(".tar") else address, *length_and_digest, **options)

    monkeypatch.setattr(remote.ShardCache, "get", get)
    capsys.readouterr()
    assert main([*command, "--out", str(tmp_path / "new"), "--data.workers=1"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("sslvit: error: http://127.0.0.1:1/x: not fetched in 2 tries")
    assert "Traceback" not in error


@pytest.mark.parametrize(("recipe", "sizes"), [("mae/digits", {8: 1}), ("dino/digits", {8: 2, 4: 2})])
def test_the_views_of_training_are_drawn(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, sizes: dict[int, int]
) -> None:
    drawn = {}

    def note(path, rows, titles, title=""):
        drawn[path.name] = (rows, titles)

    monkeypatch.setattr("sslvit.train.pictures.plot_images", note)
    run(shards, tmp_path / "run", recipe=recipe, **{"train.steps": 1})
    rows, titles = drawn["views.png"]
    assert [row.shape for row in rows] == [(8, 1, size, size) for size, count in sizes.items() for _ in range(count)]
    assert titles[0] == "view 1\n8 x 8"
    assert all(row.min() >= 0 and row.max() <= 1 and row.std() > 0.05 for row in rows)


def test_a_recipe_of_fine_tuning_is_sent_to_its_command(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="finetune/small_images.: trains with labels. Use: sslvit finetune ENCODER .*"):
        sslvit.pretrain("finetune/small_images", shards, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_training_outlives_whoever_read_its_messages(shards: Path, tmp_path: Path) -> None:
    words = command(shards, tmp_path / "run", **{"train.steps": 40})
    first_line = f"set -o pipefail; {shlex.join(words)} | head -1"
    done = subprocess.run(["bash", "-c", first_line], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("mae: encoder of")
    assert (tmp_path / "run" / "encoder" / "encoder.json").exists()
