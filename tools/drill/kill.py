"""kill -9 at random moments: earlier files are complete, and the next start ends with the same result."""

from __future__ import annotations

import time
from pathlib import Path

from children import command, in_child, sslvit
from material import TASKS, Workshop, differences, left_parts, tree
from trials import Part, Trial

from sslvit.train.folder import RunFolder

KILLS = 4  # of one run, at most
CHAINS = 5  # runs of each task in a full drill: 20 kills


def parts(workshop: Workshop) -> list[Part]:
    same = "killed and resumed, a {} run ends with the bits of one that was never stopped"
    runs = [Part(task, same.format(task), lambda trial, task=task: kill_run(trial, workshop, task), CHAINS)
            for task in TASKS]  # fmt: skip
    again = "a packing that was killed leaves no process, and a second try gives the same bytes"
    other = "{} that was killed can be run again, and leaves nothing half-written"
    return [
        *runs,
        Part("pack", again, lambda trial: kill_packing(trial, workshop), 20),
        *(Part(name, other.format(name), lambda trial, name=name: kill_other(trial, workshop, name), 6)
          for name in ("index", "import", "embed", "export", "probe", "palette")),
    ]  # fmt: skip


def kill_run(trial: Trial, workshop: Workshop, task: str) -> None:
    whole, seconds = workshop.whole_run(task)
    cut = RunFolder(trial.folder / "run")
    kills = trial.rng.randint(1, KILLS)
    trial.tried = 0
    for number in range(kills + 1):
        words = workshop.go_on(task, cut.path, by_folder=trial.rng.random() < 0.3)
        child = sslvit(trial.folder / f"start-{number}.txt", *words)
        moment = trial.rng.uniform(0, seconds)
        if number < kills and child.wait_until(moment):
            child.kill()
            trial.tried += 1
            left = child.left_behind()
            trial.expect(not left, f"{len(left)} processes live on after kill {number}")
            continue
        code = child.wait()
        if not trial.expect(code == 0, f"start {number} ({words[0]}) ended with {code}: {child.text()[-400:]}"):
            trial.tried += 1
            return
        if number < kills:  # it was faster than the kill
            break
    trial.tried = max(trial.tried, 1)
    trial.expect(not (found := differences(whole, cut)), f"not the same after {kills} kills: {', '.join(found)}")
    trial.expect(not (found := left_parts(cut.path)), f"left behind: {', '.join(found)}")


def kill_packing(trial: Trial, workshop: Workshop) -> None:
    whole, seconds = packed(workshop)
    words = pack_words(workshop, trial.folder / "out")
    for number in range(trial.rng.randint(1, 3)):
        child = sslvit(trial.folder / f"start-{number}.txt", *words)
        if not child.wait_until(trial.rng.uniform(0, seconds)):
            break
        child.kill()
        left = child.left_behind()
        trial.expect(not left, f"{len(left)} worker processes live on after kill {number}")
    if tree(trial.folder / "out") != whole:
        child = sslvit(trial.folder / "last.txt", *words)
        code = child.wait()
        trial.expect(code == 0, f"the second try ended with {code}: {child.text()[-400:]}")
    found = tree(trial.folder / "out")
    wrong = sorted(name for name in found.keys() | whole.keys() if found.get(name) != whole.get(name))
    trial.expect(not wrong, f"other bytes than without a kill: {', '.join(wrong[:5])}")


def pack_words(workshop: Workshop, out: Path) -> list[str]:
    return ["shards", "pack", str(workshop.images()), str(out), "--shard-mb", "0.02", "--resize", "32",
            "--workers", "2"]  # fmt: skip


def packed(workshop: Workshop) -> tuple[dict[str, str], float]:
    """What a packing that nothing stopped makes, and how many seconds that takes."""
    out = workshop.folder / "packed"
    if not hasattr(workshop, "packed"):
        words = pack_words(workshop, out)
        start = time.monotonic()
        in_child(command(*words), workshop.log)
        workshop.packed = tree(out), time.monotonic() - start
    return workshop.packed


def other_command(workshop: Workshop, name: str, folder: Path) -> list[str]:
    """Words of a short command that writes into the folder, which holds what it needs."""
    shards, encoder = workshop.shards(), workshop.encoder(channels=1)
    folder.mkdir(exist_ok=True)
    if name == "index" and not (folder / "shards").exists():
        (folder / "shards").mkdir()
        for tar in shards.glob("*.tar"):
            (folder / "shards" / tar.name).write_bytes(tar.read_bytes())
    return {
        "index": ["shards", "index", folder / "shards", "--workers", 2],
        "import": ["import", encoder, folder / "encoder"],
        "embed": ["embed", encoder, shards, "-o", folder / "features.npz"],
        "export": ["export", encoder, folder / "export", "--format", "safetensors"],
        "probe": ["probe", encoder, "--train", shards, "--val", shards, "--allow-same-data",
                  "--cache", folder / "cache", "-o", folder / "scores.json"],
        "palette": ["palette", shards, "-o", folder / "palette.json"],
    }[name]  # fmt: skip


def kill_other(trial: Trial, workshop: Workshop, name: str) -> None:
    reference = workshop.folder / f"other-{name}"
    if not hasattr(workshop, f"seconds_{name}"):
        words = other_command(workshop, name, reference)
        start = time.monotonic()
        in_child(command(*words), workshop.log)
        setattr(workshop, f"seconds_{name}", time.monotonic() - start)
    folder = trial.folder / "work"
    words = other_command(workshop, name, folder)
    child = sslvit(trial.folder / "first.txt", *words)
    if child.wait_until(trial.rng.uniform(0, getattr(workshop, f"seconds_{name}"))):
        child.kill()
        left = child.left_behind()
        trial.expect(not left, f"{len(left)} processes live on")
        if not is_done(folder, reference):
            child = sslvit(trial.folder / "second.txt", *words)
            child.wait()
    trial.expect(child.code == 0, f"ended with {child.code}: {child.text()[-400:]}")
    check_names(trial, folder, reference)


def is_done(folder: Path, reference: Path) -> bool:
    """Whether the killed command had written everything, so that the next rightly refuses to replace it."""
    return tree(folder).keys() == tree(reference).keys()


def check_names(trial: Trial, folder: Path, reference: Path) -> None:
    there, wanted = tree(folder).keys(), tree(reference).keys()
    trial.expect(there == wanted, f"other files than without a kill: {', '.join(sorted(there ^ wanted)[:6])}")
