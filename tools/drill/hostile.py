"""Files that try to run code, write elsewhere, fill the memory or forge the screen: none of them succeeds.

Each trial works in in/; beside it lies outside/, in which nothing may be read, written or made.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import torch
import yaml
from bombs import BOMBS
from children import Child, sslvit
from material import Workshop, tree
from paths import PATHS, VIT
from run_fixtures import TINY
from screen import FORGERIES, forge, tables
from trials import Part, Trial

from sslvit.train.folder import RunFolder

SECONDS = 45.0
MEMORY = 1 << 30  # bytes that a command may take beyond what the drill holds
PLACES = ("file", "run", "transformers", "timm", "parts", "npz", "palette", "head", "shards", "resume")
TIMM = {"architecture": "vit_base_patch16_224", "num_classes": 0, "pretrained_cfg": {"num_classes": 0},
        "model_args": {"img_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 1, "num_heads": 2}}  # fmt: skip


def parts(workshop: Workshop) -> list[Part]:
    return [
        Part("pickle", "a pickle is not run, whatever it is called and wherever it is given",
             lambda trial: pickles(trial, workshop), 120),
        Part("command", "no file makes a command run: pipe: addresses, YAML tags, $(...)",
             lambda trial: commands(trial, workshop), 60),
        Part("path", "no file makes another be written, moved or deleted outside of its folder",
             lambda trial: paths(trial, workshop), 60),
        Part("link", "links, pipes and devices among images do not hang a command or lead it elsewhere",
             lambda trial: links(trial, workshop), 20),
        Part("bomb", "a small file neither fills the memory nor takes a minute",
             lambda trial: bombs(trial, workshop), 4 * len(BOMBS)),
        Part("screen", "names from files reach the screen without control characters",
             lambda trial: screens(trial, workshop), 4 * len(FORGERIES)),
        Part("table", "names in a bench become no formula, no markup and no mathematics",
             lambda trial: tables(trial, workshop), 10),
    ]  # fmt: skip


class Runs:
    """Unpickled, it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = str(trace)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.trace,)


def at_work(trial: Trial, workshop: Workshop) -> Path:
    """in/, with shards, an encoder and a run of our own, beside outside/."""
    (trial.folder / "outside").mkdir()
    (trial.folder / "outside" / "dear.txt").write_text("to somebody")
    work = trial.folder / "in"
    shutil.copytree(workshop.shards(), work / "shards")
    shutil.copytree(workshop.encoder(channels=1), work / "own")
    return work


def attempt(trial: Trial, work: Path, words: list, may_work: bool = True) -> Child:
    """One command, and what it did besides."""
    number = len(list(trial.folder.glob("log-*.txt")))
    environment = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    limits = {resource.RLIMIT_FSIZE: MEMORY, resource.RLIMIT_CORE: 0}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    child = sslvit(trial.folder / f"log-{number}.txt", *words, folder=work, environment=environment, limits=limits)
    code = child.wait(SECONDS)
    name = " ".join(map(str, words))[:160]
    if not trial.expect(code is not None, f"{name}: still at work after {SECONDS:g} s"):
        return child
    trial.expect(code in ((0, 1) if may_work else (1,)), f"{name}: exit code {code}: {child.last_line()[-300:]}")
    trial.expect("Traceback (most recent" not in child.text(), f"{name}: a traceback: {child.text()[-300:]}")
    trial.expect(child.peak_bytes - before < MEMORY, f"{name}: took {(child.peak_bytes - before) >> 20} MB")
    kept = {"in", "outside", "trace", *(path.name for path in trial.folder.glob("log-*.txt"))}
    strange = sorted(path.name for path in trial.folder.iterdir() if path.name not in kept)
    trial.expect(not strange, f"{name}: written outside: {', '.join(strange)}")
    trial.expect(not (trial.folder / "trace").exists(), f"{name}: something in the file was run")
    is_left_alone = list(tree(trial.folder / "outside")) == ["dear.txt"]
    trial.expect(is_left_alone, f"{name}: what lies outside was changed")
    return child


# --- what would run


def pickles(trial: Trial, workshop: Workshop) -> None:
    work = at_work(trial, workshop)
    payload = {"cls_token": torch.zeros(1, 1, 16), "extra": Runs(trial.folder / "trace")}
    place = trial.rng.choice(PLACES)
    source = place_pickle(work, place, payload, workshop)
    split = ["--train", "shards", "--val", "shards"]
    doors = {
        "import": ["import", source, "out"],
        "export": ["export", source, "out", "--format", "safetensors"],
        "probe": ["probe", source, *split, "--allow-same-data", "--cache", "none"],
        "health": ["health", source, "shards"],
        "embed": ["embed", source, "shards", "-o", "out.npz"],
        "show": ["show", "attention", source, "shards"],
        "finetune": ["finetune", source, *split, "--task.allow_same_data", "true", "--out", "out"],
        "sample": ["sample", source, "-o", "out.png"],
        "init": ["pretrain", "--config", "mae/digits", "--data", "shards", "--out", "out", "--init", source,
                 "--data.global_batch_size", "8"],
    }  # fmt: skip
    fixed = {
        "palette": ["import", "own", "out", "--palette", source],
        "head": ["export", "own", "out", "--format", "safetensors", "--outputs", "logits"],
        "shards": ["shards", "index", source],
        "resume": ["pretrain", "--config", "mae/digits", "--data", "shards", "--out", source, "--resume",
                   *(f"--{key}={json.dumps(value)}" for key, value in TINY.items())],
    }  # fmt: skip
    words = fixed.get(place) or doors[trial.rng.choice(list(doors))]
    attempt(trial, work, words, may_work=place == "shards")


def place_pickle(work: Path, place: str, payload: dict, workshop: Workshop) -> str:
    """Put it where a command looks for weights; returns what to name."""
    theirs = work / "theirs"
    theirs.mkdir()
    if place == "npz":
        np.savez(work / "arrays.npz", wte=np.array([payload["extra"]], dtype=object))
        return "arrays.npz"
    if place == "palette":
        np.save(work / "palette.npy", np.array([payload["extra"]], dtype=object))
        return "palette.npy"
    if place == "resume":
        shutil.copytree(workshop.whole_run("mae")[0].path, work / "run")
        torch.save(payload, RunFolder(work / "run").checkpoint)
        return "run"
    file, config = {
        "file": (work / "released.pth", None), "run": (work / "run" / "checkpoints" / "last.ckpt", None),
        "transformers": (theirs / "pytorch_model.bin", VIT), "timm": (theirs / "pytorch_model.bin", TIMM),
        "parts": (theirs / "part-1.bin", VIT), "head": (work / "own" / "head.safetensors", None),
        "shards": (theirs / "shard.tar", None),
    }[place]  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(payload, file)
    if config:
        (theirs / "config.json").write_text(json.dumps(config))
    if place == "parts":
        index = {"weight_map": {"embeddings.cls_token": "part-1.bin"}}
        (theirs / "model.safetensors.index.json").write_text(json.dumps(index))
    return {"file": "released.pth", "run": "run", "head": "own"}.get(place, "theirs")


def commands(trial: Trial, workshop: Workshop) -> None:
    work = at_work(trial, workshop)
    trace = trial.folder / "trace"
    runs = trial.rng.choice((f"pipe:mkdir {trace}", f"pipe: mkdir {trace} ; cat shards/*.tar", f"$(mkdir {trace})",
                             f"`mkdir {trace}`", f"shards; mkdir {trace}", f"::pipe:mkdir {trace}"))  # fmt: skip
    recipe = (
        {**yaml.safe_load((Path("configs") / "mae" / "digits.yaml").read_text())} if Path("configs").is_dir() else {}
    )
    recipe.setdefault("data", {})
    out = ["--out", "out", *(f"--{key}={json.dumps(value)}" for key, value in TINY.items())]
    what = trial.rng.choice(("option", "recipe", "allowed", "mixture", "tag", "index", "bench", "init"))
    words = ["pretrain", "--config", "recipe.yaml", *out]
    if what == "option":
        words = ["pretrain", "--config", "mae/digits", "--data", runs, *out]
    elif what == "init":
        words = ["pretrain", "--config", "mae/digits", "--data", "shards", "--init", runs, *out]
    elif what in ("recipe", "allowed"):
        recipe["data"] |= {"shards": runs, "stream_samples": 10, **({"allow_pipe": True} if what == "allowed" else {})}
    elif what == "mixture":
        recipe["data"] |= {"mixture": {runs: 1.0, "shards": 1.0}}
    elif what == "index":
        about = json.loads((work / "shards" / "index.json").read_text())
        next(iter(about["splits"].values()))["filenames"][0] = runs
        (work / "shards" / "index.json").write_text(json.dumps(about))
        words = trial.rng.choice((["shards", "check", "shards"], ["embed", "own", "shards", "-o", "out.npz"],
                                  ["pretrain", "--config", "mae/digits", "--data", "shards", *out]))  # fmt: skip
    elif what == "bench":
        content = {"encoders": {"x": runs}, "data": {"d": {"train": runs, "val": "shards"}}, "columns": {"knn": "knn"}}
        (work / "bench.yaml").write_text(yaml.dump(content))
        words = ["bench", "bench.yaml", "--out", "out"]
    if words[2:3] == ["recipe.yaml"]:
        tag = f"\nmore: !!python/object/apply:os.mkdir ['{trace}']\n" if what == "tag" else ""
        (work / "recipe.yaml").write_text(yaml.dump(recipe) + tag)
    attempt(trial, work, words, may_work=what == "index")


# --- what leads elsewhere


def paths(trial: Trial, workshop: Workshop) -> None:
    work = at_work(trial, workshop)
    (work / "dear.txt").write_text("ours")
    up = "../" * trial.rng.randint(1, 4)
    out = trial.rng.choice((
        f"{up}outside/dear.txt", str(trial.folder / "outside" / "dear.txt"), f"{up}outside/new.tar", f"{up}dear.txt",
        "../../dear.txt", "../../escaped.tar", "..", "/", "x/../../outside/new.tar",
    ))  # fmt: skip
    case = trial.rng.choice(PATHS)
    for words in case(work, out, workshop):
        attempt(trial, work, words)


def links(trial: Trial, workshop: Workshop) -> None:
    work = at_work(trial, workshop)
    folder = work / "photos" / "cat"
    shutil.copytree(workshop.images() / "cat", folder)
    for name, target in {
        "device.png": "/dev/zero",
        "loop.png": "loop.png",
        "none.jpg": "nowhere.jpg",
        "secret.jpg": "/etc/passwd",
        "folder.jpg": "..",
        "memory.png": "/proc/self/mem",
    }.items():
        if trial.rng.random() < 0.7:
            (folder / name).symlink_to(target)  # fmt: skip
    os.mkfifo(folder / "pipe.jpg")
    (folder / "again").symlink_to("..")
    attempt(trial, work, ["shards", "pack", "photos", "packed", "--resize", "8", "--workers", "1"])
    attempt(trial, work, ["embed", "own", "photos", "-o", "features.npz"])


def bombs(trial: Trial, workshop: Workshop) -> None:
    work = at_work(trial, workshop)
    names = sorted(BOMBS)
    name = names[int(trial.name.rpartition("-")[2]) % len(names)]
    for words in BOMBS[name](work, trial.rng):
        attempt(trial, work, words)


def screens(trial: Trial, workshop: Workshop) -> None:
    work = at_work(trial, workshop)
    forge(trial, work, lambda words: attempt(trial, work, words))
