"""The run folder: all that a run made, and never overwritten silently.

config.yaml      exactly what ran
metrics.jsonl    one line per logged step, appended
checkpoints/     last.ckpt
encoder/         encoder.json + encoder.safetensors
ledger.json      how many samples were read, which could not be and why
ledger/          with data.ledger: one file per rank, a line per sample that it read
scores.json      of a classifier: right answers on the reported images
health.json      whether training has collapsed, and what to do about it
tensorboard/     wandb/      what those were told, where the settings ask for it
incident/        a step that was not finite, of a run that ended so
figures/
.lock            held by the process that trains
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import yaml

from sslvit.files import held_folder, new_file, printable, write_atomically
from sslvit.weight_files import check_checkpoint

LOCK = ".lock"
WAIT_SECONDS = 30.0  # for the process before, which writes its last checkpoint
NAMED = f"step-{'[0-9]' * 8}.ckpt"  # and not what a user calls step-best.ckpt
# what a run has made when it is killed before its first checkpoint
BEGUN = {"config.yaml", "checkpoints", "metrics.jsonl", "ledger.json", "ledger", "health.json", "figures",
         "tensorboard", "wandb"}  # fmt: skip


class _Dumper(yaml.SafeDumper):
    """Lists of plain values on one line."""

    def represent_sequence(self, tag: str, sequence: list, flow_style: bool | None = None) -> yaml.Node:
        is_plain = not any(isinstance(value, (list, dict)) for value in sequence)
        return super().represent_sequence(tag, sequence, flow_style=is_plain)


class RunFolder:
    """Paths of one run.

    Args:
        path: the folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoint = self.path / "checkpoints" / "last.ckpt"
        self.encoder = self.path / "encoder"
        self.ledger = self.path / "ledger.json"
        self.health = self.path / "health.json"
        self.samples = self.path / "ledger"
        self.incident = self.path / "incident"
        self.tensorboard = self.path / "tensorboard"
        self.wandb = self.path / "wandb"
        self.figures = self.path / "figures"
        self.scores = self.path / "scores.json"

    def held(self, waits: bool) -> AbstractContextManager[None]:
        """The folder for this process alone, while the block runs.

        Args:
            waits: a little for an earlier process that is ending, as that of a job in the queue again.

        Raises:
            ValueError: another process works there, or it is a file.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{printable(self.path)}: is a file. Choose another run folder.")
        return held_folder(self.path, "go on with this run", LOCK, WAIT_SECONDS if waits else 0.0)

    @property
    def goes_on(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return any(self.checkpoint.parent.glob("*.ckpt"))

    def check(self, resume: bool, overwrite: bool) -> None:
        """Whether the folder may be used so; nothing is touched. A run without a checkpoint has nothing to lose.

        Raises:
            ValueError: it holds a run and neither flag is given, both are, or it is not a run to resume or overwrite.
        """
        if resume and overwrite:
            raise ValueError("--resume and --overwrite exclude each other: go on with the old run, or start anew?")
        found = {entry.name for entry in self.path.iterdir()} - {LOCK} if self.path.is_dir() else set()
        has_only_begun = (
            not self.goes_on
            and all(name in BEGUN or name.endswith(".part") for name in found)
            and bool(found)
        )  # fmt: skip
        if has_only_begun:
            print(
                f"{printable(self.path)}: a run that ended before its first checkpoint; it starts at step 0", flush=True
            )
            return
        if resume and not self.goes_on:
            raise ValueError(
                f"--resume: {printable(self.path)} has no checkpoint ({self.checkpoint.name}). Start without --resume."
            )
        if found and not (resume or overwrite):
            raise ValueError(
                f"{printable(self.path)}: already exists. Pass --resume to go on, or --overwrite to start anew."
            )
        if found and overwrite and not (self.config.exists() and self.checkpoint.parent.is_dir()):
            raise ValueError(
                f"{printable(self.path)}: not a run folder (no config.yaml and checkpoints/), so it is left alone."
            )

    def start(self, settings: dict[str, Any], goes_on: bool) -> None:
        """Make the folder and write down what runs; an earlier run's files go, unless the run goes on.

        What is written is on the disk before anything is deleted.
        """
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        with new_file(self.config) as part:
            part.write_text(yaml.dump(settings, Dumper=_Dumper, sort_keys=False, width=120))
            if not goes_on:
                for made in (
                    self.checkpoint.parent,
                    self.figures,
                    self.samples,
                    self.incident,
                    self.tensorboard,
                    self.wandb,
                ):
                    shutil.rmtree(made, ignore_errors=True)
                for made in (self.metrics, self.ledger, self.health, self.scores):
                    made.unlink(missing_ok=True)
        shutil.rmtree(self.encoder, ignore_errors=True)  # the checkpoint is newer from now on
        self.checkpoint.parent.mkdir(exist_ok=True)

    def newest_checkpoint(self) -> Path:
        """The newest checkpoint whose bytes are as they were written; a damaged one is said, and the one before taken.

        Raises:
            ValueError: none is whole.
        """
        kept = sorted(self.checkpoint.parent.glob(NAMED), reverse=True)
        candidates = [path for path in [self.checkpoint, *kept] if path.exists()]
        problem: Exception | None = None
        for path in candidates:
            if problem is not None and path.samefile(self.checkpoint) and path != self.checkpoint:
                continue  # the damaged one by its other name
            try:
                check_checkpoint(path)
            except (ValueError, OSError) as error:
                print(f"warning: {error}", flush=True)
                problem = problem or error
                continue
            if problem is not None:
                print(f"going on from the checkpoint before it: {printable(path)}", flush=True)
            return path
        raise ValueError(
            f"{problem} No other checkpoint is kept there (train.keep_last keeps some): copy one back, or start anew "
            "with --overwrite."
        )

    def samples_read(self, rank: int) -> Path:
        """The file of a rank's sample keys."""
        self.samples.mkdir(exist_ok=True)
        return self.samples / f"rank-{rank:05d}.jsonl"

    def cut_samples_read(self, step: int) -> None:
        """Drop samples of steps after a checkpoint's, which the resumed run will read again."""
        for path in self.samples.glob("rank-*.jsonl"):
            with new_file(path) as part, open(part, "w") as new:
                new.writelines(text for text, line in read_lines(path) if line["step"] < step)

    def read_config(self) -> dict[str, Any]:
        """What config.yaml says.

        Raises:
            ValueError: it is missing or damaged.
        """
        try:
            content = yaml.safe_load(self.config.read_text())
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            reason = printable(" ".join(str(error).split()), 120)
            raise ValueError(f"{printable(self.config)}: not the settings of a run ({reason}).") from error
        if not isinstance(content, dict):
            raise ValueError(f"{printable(self.config)}: holds no settings, so the run cannot go on.")
        return content

    def read_metrics(self) -> list[dict[str, float]]:
        """The lines of metrics.jsonl."""
        return [line for _, line in read_lines(self.metrics)] if self.metrics.exists() else []

    def cut_metrics(self, step: int) -> None:
        """Drop lines after a checkpoint's step, which the resumed run will write again."""
        kept = [line for line in self.read_metrics() if line["step"] <= step]
        write_atomically(self.metrics, "".join(json.dumps(line) + "\n" for line in kept))


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(text, content) of the lines of a run's .jsonl; damaged ones are passed over and said.

    The last one may be half a line, which a killed run leaves behind.
    """
    bad: list[int] = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, text in enumerate(file, 1):
            if not text.endswith("\n"):
                break
            try:
                line = json.loads(text)
                is_whole = isinstance(line, dict) and isinstance(line.get("step"), int)
            except (ValueError, RecursionError):
                is_whole = False
            if is_whole:
                yield text, line
            else:
                bad.append(number)
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        print(f"warning: {printable(path)}: line {bad[0]}{more} damaged and passed over", flush=True)
