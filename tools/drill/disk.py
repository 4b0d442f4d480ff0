"""A disk that fills up in the middle: the message names file and remedy, nothing from before is lost, and with room
again the same command works."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml
from children import Child, command, in_child, one_line_error, sslvit
from kill import pack_words
from material import Workshop, differences, import_libraries, left_parts, tree
from trials import Part, Trial

from sslvit.checkpoint import load_encoder
from sslvit.train.folder import RunFolder

DISK_MB = 32
PAGE = 4096
REMEDY = re.compile(r"[Mm]ake room|[Cc]hoose another|disk and its permissions")
SPOKEN = {"encoder": "the encoder at the end of a run", "cache": "a probe's features", "scores": "a probe's table"}
FORMATS = ("safetensors", "torch", "timm", "onnx", "transformers")


@dataclass
class Scene:
    """One point at which a disk fills up.

    Args:
        words: of the command, given the folder on the small disk.
        before: makes what lies there already.
        check: what is wrong afterwards with what was there before, in words; None to compare all its bytes.
        again: words of the next try, where they differ.
        survives: the command ends well all the same.
        spared: that many bytes are written before the point is reached, given a folder where it all worked.
    """

    words: Callable[[Path], list]
    before: Callable[[Path], None] | None = None
    check: Callable[[Path], str] | None = None
    again: Callable[[Path], list] | None = None
    survives: bool = False
    spared: Callable[[Path], int] | None = None


def parts(workshop: Workshop) -> list[Part]:
    promise = "a disk that fills up in {}: one line with file and remedy, nothing lost, the next try works"
    goes_on = "a disk that fills up in {} does not end the command"
    full = [
        Part(name, (goes_on if scene.survives else promise).format(SPOKEN.get(name, name.replace("-", " to "))),
             lambda trial, scene=scene: fill_up(trial, workshop, scene), 10)
        for name, scene in scenes(workshop).items()
    ]  # fmt: skip
    bit = "a checkpoint with a flipped bit is noticed, and the run goes on from the one before it to the same bits"
    return [*full, Part("bit", bit, lambda trial: flip_a_bit(trial, workshop), 20)]


def scenes(workshop: Workshop) -> dict[str, Scene]:
    shards, encoder = workshop.shards, lambda: workshop.encoder(channels=1)

    def run(folder: Path, *flags: str, **more) -> list[str]:
        return workshop.pretrain("mae", folder / "run", *flags, **{"data.workers": 0, "train.steps": 9} | more)

    def made(*words: object) -> Callable[[Path], None]:
        return lambda folder: in_child(command(*run(folder, *words)), workshop.log)

    def without_index(folder: Path) -> None:
        shutil.copytree(shards(), folder / "shards", ignore=shutil.ignore_patterns("index.*", "_info*"))

    def goes_on(folder: Path) -> list[str]:
        is_begun = (folder / "run" / "checkpoints" / "last.ckpt").exists()
        return run(folder, *(["--resume"] if is_begun else []), **longer)

    longer = {"train.steps": 15}
    once = {"train.checkpoint_every": 1000}
    found = {
        "pack": Scene(lambda folder: pack_words(workshop, folder / "out")),
        "index": Scene(lambda folder: ["shards", "index", folder / "shards"], without_index),
        "pretrain": Scene(lambda folder: run(folder, **longer), again=goes_on, check=run_is_whole),
        "resume": Scene(lambda folder: run(folder, "--resume", **longer), made(), run_is_whole),
        "encoder": Scene(
            lambda folder: run(folder, **longer | once), again=goes_on, check=run_is_whole, spared=all_but_the_encoder
        ),
        "cache": Scene(
            lambda folder: ["probe", encoder(), "--train", shards(), "--val", shards(), "--allow-same-data",
                            "--cache", folder / "cache"],
            survives=True,
        ),
        "scores": Scene(
            lambda folder: ["probe", encoder(), "--train", shards(), "--val", shards(), "--allow-same-data",
                            "--cache", "none", "-o", folder / "scores.json"]
        ),
        "import": Scene(lambda folder: ["import", encoder(), folder / "encoder"]),
        "embed": Scene(lambda folder: ["embed", encoder(), shards(), "-o", folder / "features.npz"]),
        "palette": Scene(lambda folder: ["palette", shards(), "-o", folder / "palette.json"]),
        "bench": Scene(lambda folder: ["bench", bench_file(workshop), "--out", folder / "bench", "--device", "cpu"]),
    }  # fmt: skip
    for kind in FORMATS:
        source = encoder if kind in ("safetensors", "torch", "onnx") else workshop.encoder
        found[f"export-{kind}"] = Scene(
            lambda folder, kind=kind, source=source: [
                "export", source(), folder / "export", "--format", kind, "--overwrite",
                *([] if kind == "safetensors" else ["--size", "fixed"]),
            ]
        )  # fmt: skip
    return found


def fill_up(trial: Trial, workshop: Workshop, scene: Scene) -> None:
    if trial.name.startswith(("export-timm", "export-transformers")):
        import_libraries()
    least, needed = room_needed(trial, workshop, scene)
    with small_disk(trial.folder / "disk") as folder:
        if scene.before:
            scene.before(folder)
        there = tree(folder)
        room = least if trial.rng.random() < 0.25 else trial.rng.uniform(least, max(needed, least))
        with filled(folder, int(room)) as limits:
            child = sslvit(trial.folder / "full.txt", *scene.words(folder), limits=limits)
            child.wait()
        if scene.survives:
            trial.expect(child.code == 0, f"ended with {child.code}: {child.last_line()}")
        elif child.code != 0:
            check_words(trial, child, folder)
        lost = sorted(name for name in there if tree(folder).get(name) != there[name])
        problem = scene.check(folder) if scene.check else f"lost or changed: {', '.join(lost)}" if lost else ""
        trial.expect(not problem, problem)
        if child.code == 0:
            return  # there was room enough
        again = sslvit(trial.folder / "again.txt", *(scene.again or scene.words)(folder))
        trial.expect(again.wait() == 0, f"with room again: {again.code}, {again.last_line()[-400:]}")
        trial.expect(not (left := left_parts(folder)), f"left behind: {', '.join(left[:4])}")


def flip_a_bit(trial: Trial, workshop: Workshop) -> None:
    whole, _ = workshop.whole_run("dino")  # which keeps two checkpoints
    cut = RunFolder(trial.folder / "run")
    child = sslvit(trial.folder / "first.txt", *workshop.pretrain("dino", cut.path))
    while child.poll() is None and len(list(cut.checkpoint.parent.glob("step-*.ckpt"))) < 2:
        time.sleep(0.002)
    child.kill()
    content = bytearray(cut.checkpoint.read_bytes())
    content[trial.rng.randrange(len(content))] ^= 1 << trial.rng.randrange(8)
    with open(cut.checkpoint, "r+b") as file:  # in its place, as a disk does it: other names of the file see it too
        file.write(content)
    again = sslvit(trial.folder / "again.txt", *workshop.go_on("dino", cut.path, by_folder=trial.rng.random() < 0.5))
    if trial.expect(again.wait() == 0, f"with a flipped bit: {again.code}, {again.last_line()[-400:]}"):
        trial.expect(not (found := differences(whole, cut)), f"goes on with the flipped bit: other {', '.join(found)}")


def check_words(trial: Trial, child: Child, folder: Path) -> None:
    """Whether the message has a file on the disk, a remedy, and one line."""
    if problem := one_line_error(child):
        trial.problem(problem)
        return
    last = child.last_line()
    trial.expect(child.code == 1, f"exit code {child.code}: {last}")
    trial.expect(str(folder) in last, f"names no file on the full disk: {last}")
    trial.expect(bool(REMEDY.search(last)), f"no remedy: {last}")


def room_needed(trial: Trial, workshop: Workshop, scene: Scene) -> tuple[int, int]:
    """Bytes before the point is reached, and bytes that the command takes where there is room; measured once."""
    name = trial.name.rpartition("-")[0]
    known = workshop.__dict__.setdefault("rooms", {})
    if name not in known:
        folder = trial.folder / "room"
        folder.mkdir()
        if scene.before:
            scene.before(folder)
        before = used(folder)
        in_child(command(*scene.words(folder)), workshop.log)
        known[name] = scene.spared(folder) if scene.spared else 0, used(folder) - before
    return known[name]


def used(folder: Path) -> int:
    """Bytes of a folder's files in whole pages, as a tmpfs counts them."""
    return sum(-(-path.stat().st_size // PAGE) * PAGE for path in folder.rglob("*") if path.is_file())


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A tmpfs of a few megabytes; for a user who may not mount one, a plain folder."""
    folder.mkdir()
    if not may_mount():
        yield folder
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "drill", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@contextmanager
def filled(folder: Path, room: int) -> Iterator[dict[int, int]]:
    """The disk full but for so many bytes, while the block runs; limits for the child that stand for it otherwise."""
    if not may_mount():
        yield {resource.RLIMIT_FSIZE: max(room // 4, 1)}  # of each file
        return
    filler = folder / ".filler"
    free = os.statvfs(folder)
    with open(filler, "wb") as file:
        length = free.f_bavail * free.f_bsize - room // PAGE * PAGE
        if length > 0:
            os.posix_fallocate(file.fileno(), 0, length)
    try:
        yield {}
    finally:
        filler.unlink()


def may_mount() -> bool:
    return os.geteuid() == 0 and shutil.which("mount") is not None


def run_is_whole(folder: Path) -> str:
    """What is wrong with a run that met a full disk; what it began to write may be there or not."""
    run = RunFolder(folder / "run")
    if not run.checkpoint.exists():
        return ""
    if not isinstance(yaml.safe_load(run.config.read_text()), dict):
        return "config.yaml is empty"
    try:
        load_encoder(run.path)
    except (ValueError, OSError) as error:
        return f"no encoder can be read from the run any more: {error}"
    return ""


def all_but_the_encoder(folder: Path) -> int:
    run = RunFolder(folder / "run")
    return used(run.path) - used(run.encoder) - used(run.figures)


def bench_file(workshop: Workshop) -> Path:
    """A small bench: one encoder, neighbors and a linear probe."""
    file = workshop.folder / "bench.yaml"
    if not file.exists():
        shards = str(workshop.shards())
        content = {
            "encoders": {"small": str(workshop.encoder(channels=1))},
            "data": {"digits": {"train": shards, "val": shards}},
            "columns": {"knn": {"kind": "knn", "neighbors": 3}, "linear": {"kind": "linear"}},
            "baselines": ["pixels"],
        }
        file.write_text(yaml.dump(content))
    return file
