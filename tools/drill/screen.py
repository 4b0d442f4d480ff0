"""Names that would forge lines of output, or act as formulas or markup in a table that somebody opens."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import yaml
from bombs import tar_of
from children import Child, sslvit
from material import Workshop
from shard_fixtures import encoded, photograph
from trials import Trial

EVIL = (
    "\x1b[31mred\x1b[0m", "two\nsslvit: all is well", "back\rforged", "\x9b2J", "\u202egnp.exe", "bell\x07",
    "\x1b]0;title\x07",
)  # fmt: skip
NAMES = (
    "=1+1", "@SUM(A1)", "+cmd C calc", "-2+3", "<script>alert(1)<script>", "$x_{", "100 % & 3 # ^ _", "**bold**",
    "[link](javascript:alert(1))", "{frac}_1",
)  # fmt: skip


def forge(trial: Trial, work: Path, attempt: Callable[[list], Child]) -> None:
    """Names of one kind, and the commands that print them."""
    evil = trial.rng.choice(EVIL)
    names = sorted(FORGERIES)
    case = FORGERIES[names[int(trial.name.rpartition("-")[2]) % len(names)]]
    for words in case(work, evil):
        text = attempt(words).text()
        raw = sorted({character for character in text if not character.isprintable() and character not in "\n"})
        trial.expect(not raw, f"{' '.join(words)[:80]}: {raw} reached the screen")
        trial.expect("\nsslvit: all is well" not in text, f"{' '.join(words)[:80]}: a forged line")


def members(work: Path, evil: str) -> list[list]:
    (work / "theirs").mkdir()
    bad = b"not an image"
    names = [f"{evil}.png", f"good{evil}.png", f"{evil}.pkl", f"\udcff{evil}.jpg"]
    image = encoded(photograph(8, 8), "PNG")
    (work / "theirs" / "shard.tar").write_bytes(tar_of(names, [bad, image, bad, bad]))
    return [["shards", "index", "theirs", "--workers", "1"], ["shards", "check", "theirs", "--workers", "1"],
            ["shards", "info", "theirs"], ["embed", "own", "theirs", "-o", "out.npz"]]  # fmt: skip


def files(work: Path, evil: str) -> list[list]:
    for name in (f"cat{evil}", "dog"):
        folder = work / "photos" / name
        folder.mkdir(parents=True)
        (folder / f"good{evil}.png").write_bytes(encoded(photograph(8, 8), "PNG"))
        (folder / f"bad{evil}.png").write_bytes(b"not an image")
    return [["shards", "pack", "photos", "packed", "--workers", "1"], ["shards", "info", "packed"],
            ["shards", "pack", f"none{evil}", "packed-2"]]  # fmt: skip


def skipped(work: Path, evil: str) -> list[list]:
    about = json.loads((work / "shards" / "index.json").read_text())
    about |= {"skipped": {evil: evil}, "encoding": evil, "classes": [evil, f"b{evil}"]}
    (work / "shards" / "index.json").write_text(json.dumps(about))
    return [["shards", "info", "shards"], ["shards", "check", "shards", "--workers", "1"]]


def settings(work: Path, evil: str) -> list[list]:
    (work / "recipe.yaml").write_text(yaml.dump({evil: 1, "train": {f"steps{evil}": 3}}))
    (work / "value.yaml").write_text(yaml.dump({"train": {"precision": evil}}))
    (work / "bench.yaml").write_text(yaml.dump({"encoders": {evil: "own"}, "data": {"d": {"train": evil, "val": evil}},
                                                "columns": {evil: {"kind": evil}}}))  # fmt: skip
    pretrain = ["pretrain", "--data", "shards", "--out", "out", "--config"]
    return [[*pretrain, "recipe.yaml"], [*pretrain, "value.yaml"], ["bench", "bench.yaml"]]


def weights(work: Path, evil: str) -> list[list]:
    about = json.loads((work / "own" / "encoder.json").read_text())
    about["encoder"][evil] = evil
    (work / "own" / "encoder.json").write_text(json.dumps(about))
    np.savez(work / "weights.npz", **{evil.replace("/", ""): np.zeros(3)})
    theirs = work / "theirs"
    theirs.mkdir()
    (theirs / "config.json").write_text(json.dumps({"model_type": evil}))
    return [["import", "own", "out"], ["import", "weights.npz", "out"], ["import", "theirs", "out"]]


def lists(work: Path, evil: str) -> list[list]:
    (work / "list.jsonl").write_text(json.dumps({"path": evil, "label": evil}) + "\n")
    (work / "list.csv").write_text(f'path,label,"{evil}"\n"x{evil}",1,2\n')
    (work / "columns.csv").write_text(f'"{evil}"\n1\n')
    return [["shards", "pack", name, "packed"] for name in ("list.jsonl", "list.csv", "columns.csv")]


FORGERIES = {case.__name__: case for case in (members, files, skipped, settings, weights, lists)}


def tables(trial: Trial, workshop: Workshop) -> None:
    """A bench with such names ends well, and its tables hold them as text."""
    encoder, shards = workshop.encoder(channels=1), str(workshop.shards())
    row, column, data = trial.rng.sample(NAMES, 3)
    content = {
        "encoders": {row: str(encoder)}, "data": {data: {"train": shards, "val": shards}},
        "columns": {column: {"kind": "knn", "neighbors": 3}}, "baselines": ["pixels"], "allow_same_data": True,
    }  # fmt: skip
    (trial.folder / "bench.yaml").write_text(yaml.dump(content))
    words = ["bench", "bench.yaml", "--out", "out", "--device", "cpu"]
    child = sslvit(trial.folder / "log.txt", *words, folder=trial.folder)
    child.wait()
    names = f"{row!r}, {column!r}, {data!r}"
    said = f"a bench with the names {names} ended with {child.code}: {child.last_line()}"
    if not trial.expect(child.code == 0, said):
        return
    with open(trial.folder / "out" / "table.csv", newline="") as file:
        cells = [cell for line in csv.reader(file) for cell in line]
    live = [cell for cell in cells if cell[:1] in ("=", "+", "@", "-") and not is_number(cell)]
    trial.expect(not live, f"table.csv: live formulas {live}")
    for page in ("report.html", "table.md"):
        trial.expect("<script>alert" not in (trial.folder / "out" / page).read_text(), f"{page}: live markup")
    shutil.rmtree(trial.folder / "out")


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
