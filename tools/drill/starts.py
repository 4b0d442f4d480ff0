"""Two processes on one folder at once: one works, the other is refused in one line and destroys nothing."""

from __future__ import annotations

import time
from pathlib import Path

from children import Child, one_line_error, sslvit
from kill import pack_words, packed
from material import Workshop, differences, tree
from trials import Part, Trial

from sslvit.train.folder import RunFolder

OFFSET_SECONDS = 0.3  # at most, between the two; runs and packings last longer
WAITS = "another process is at work there; waiting"
STEPS = {"train.steps": 80}  # of a run that outlasts the second start


def parts(workshop: Workshop) -> list[Part]:
    return [
        Part("fresh", "of two starts on a new run folder exactly one runs, to the same bits as alone",
             lambda trial: two_runs(trial, workshop), 10),
        Part("resume", "of two resumes of one run one goes on at a time, to the same bits as alone",
             lambda trial: two_resumes(trial, workshop), 10),
        Part("overwrite", "an --overwrite beside a running run is refused and destroys nothing",
             lambda trial: overwrite_running(trial, workshop), 10),
        Part("pack", "of two packings into one folder exactly one works, to the same bytes as alone",
             lambda trial: two_packings(trial, workshop), 15),
        Part("parts", "two parts of one packing at once both work, and join to the same bytes",
             lambda trial: two_parts(trial, workshop), 10),
    ]  # fmt: skip


def two_runs(trial: Trial, workshop: Workshop) -> None:
    out = RunFolder(trial.folder / "run")
    words = workshop.pretrain("mae", out.path, **STEPS)
    one_of_two(trial, words, words)
    check_run(trial, workshop, out)


def two_resumes(trial: Trial, workshop: Workshop) -> None:
    out = half_run(trial, workshop)
    words = workshop.pretrain("mae", out.path, "--resume", **STEPS)
    one_of_two(trial, words, words)
    check_run(trial, workshop, out)


def overwrite_running(trial: Trial, workshop: Workshop) -> None:
    """The second comes when the first has begun, so it is clear which may run."""
    out = RunFolder(trial.folder / "run")
    first = sslvit(trial.folder / "first.txt", *workshop.pretrain("mae", out.path, **STEPS))
    while first.poll() is None and not out.config.exists():
        time.sleep(0.002)
    flag = trial.rng.choice(["--overwrite", "--overwrite", "--resume"])
    time.sleep(trial.rng.uniform(0, OFFSET_SECONDS))
    second = sslvit(trial.folder / "second.txt", *workshop.pretrain("mae", out.path, flag, **STEPS))
    codes = [first.wait(), second.wait()]
    said = f"{first.last_line()[-200:]} | {second.last_line()[-200:]}"
    waited = flag == "--resume" and WAITS in second.text()
    if trial.expect(codes == [0, 1] or (waited and codes == [0, 0]), f"exit codes {codes}, {flag} second: {said}"):
        problem = "" if waited else one_line_error(second)
        trial.expect(not problem, problem)
        check_run(trial, workshop, out)


def two_packings(trial: Trial, workshop: Workshop) -> None:
    whole, _ = packed(workshop)
    out = trial.folder / "out"
    words = pack_words(workshop, out)
    one_of_two(trial, words, words)
    trial.expect(tree(out) == whole, "other bytes than of one packing alone")


def two_parts(trial: Trial, workshop: Workshop) -> None:
    whole, _ = packed(workshop)
    out = trial.folder / "out"
    both = begin(trial, *([*pack_words(workshop, out), "--part", f"{number}/2"] for number in (1, 2)))
    codes = [child.wait() for child in both]
    if not trial.expect(codes == [0, 0], f"exit codes {codes}: {both[0].last_line()} | {both[1].last_line()}"):
        return
    join = sslvit(trial.folder / "join.txt", "shards", "index", out, "--merge")
    trial.expect(join.wait() == 0, f"joining the parts ended with {join.code}: {join.last_line()}")
    trial.expect(tree(out) == whole, "other bytes than of one packing alone")


def begin(trial: Trial, *commands: list[str]) -> list[Child]:
    """Both commands, a random moment apart."""
    children = []
    for number, words in enumerate(commands):
        children.append(sslvit(trial.folder / f"start-{number}.txt", *words))
        time.sleep(trial.rng.choice([0, trial.rng.uniform(0, OFFSET_SECONDS)]))
    return children


def one_of_two(trial: Trial, *commands: list[str]) -> None:
    """Exactly one ends well, and the other says in one line that it is not its turn, or that it waits for its turn."""
    children = begin(trial, *commands)
    codes = [child.wait() for child in children]
    if codes == [0, 0] and any(WAITS in child.text() for child in children):
        return  # a resume waits a little for a job that is ending; there was nothing left for it to do
    said = " | ".join(child.last_line()[-200:] for child in children)
    if trial.expect(sorted(map(str, codes)) == ["0", "1"], f"exit codes {codes}, not 0 and 1: {said}"):
        problem = one_line_error(children[codes.index(1)])
        trial.expect(not problem, problem)


def half_run(trial: Trial, workshop: Workshop) -> RunFolder:
    """A run that was killed on its way, with a checkpoint."""
    out = RunFolder(trial.folder / "run")
    child = sslvit(trial.folder / "before.txt", *workshop.pretrain("mae", out.path, **STEPS))
    while child.poll() is None and not out.checkpoint.exists():
        time.sleep(0.002)
    child.kill()
    child.left_behind()
    return out


def check_run(trial: Trial, workshop: Workshop, out: RunFolder) -> None:
    """Whether the folder holds what one process alone would have left there."""
    alone = RunFolder(workshop.folder / "alone")
    if not (alone.encoder / "encoder.json").exists():
        child = sslvit(Path(workshop.log), *workshop.pretrain("mae", alone.path, **STEPS))
        if child.wait() != 0:
            raise RuntimeError(f"a run alone ended with {child.code}: {child.last_line()}")
    if trial.problems:
        return
    trial.expect(not (found := differences(alone, out)), f"not the same as of one process alone: {', '.join(found)}")
