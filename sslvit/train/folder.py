"""The run folder: everything that a run makes, never overwritten silently.

config.yaml      exactly what ran, and under made_by each process that ran it: command, date, host, versions, commits
metrics.jsonl    one line per logged step, appended
checkpoints/     last.ckpt
encoder/         encoder.json + encoder.safetensors
ledger.json      how many samples were read, which could not be and why
ledger/          with data.ledger: one file per rank, a line per sample that it read
scores.json      accuracy of a classifier on the reported images
health.json      whether training has collapsed, and what to do about it
tensorboard/     wandb/     mlflow/      logs of these trackers, if the settings ask for them
incident/        a step that was not finite, if such steps ended the run
figures/
report.html      all of this on one page (report.py)
.lock            locked by the process that trains
"""

from __future__ import annotations

import json
import logging
import math
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from sslvit.environment import describe_process
from sslvit.files import new_file, printable, remove_stale_temporaries, to_json, write_atomically, write_error
from sslvit.locks import lock_folder
from sslvit.pages.page import is_page
from sslvit.results import Result, decimals
from sslvit.settings.data import is_given
from sslvit.settings.load import MADE_BY, YAML_ERRORS, by_dotted_key
from sslvit.sharded_checkpoint import SHARDS, check_checkpoint

logger = logging.getLogger(__name__)

LOCK = ".lock"
PAGE = "report"  # the kind of its page
BRANCHED_FROM = "branched_from"  # key of an entry under made_by: the run that was copied
WAIT_SECONDS = 30.0  # for the previous process, which may be writing its last checkpoint
NAMED = f"step-{'[0-9]' * 8}.ckpt"  # does not match a user's own step-best.ckpt
SECTIONS = {"task", "encoder", "data", "train"}  # in every config.yaml
# settings that Python may give as objects -> the argument that gives them again
GIVEN_AS = {
    "data.shards": "data", "task.val": "val", "data.view.function": "transform", "online.train": "online.train",
    "online.val": "online.val",
}  # fmt: skip
# what a run may have written when it is killed before its first checkpoint
BEGUN = {
    "config.yaml", "checkpoints", "metrics.jsonl", "ledger.json", "ledger", "health.json", "tensorboard", "wandb",
    "mlflow", "report.html",
}  # fmt: skip


class _Dumper(yaml.SafeDumper):
    """Lists of plain values on one line."""

    def represent_sequence(self, tag: str, sequence: list, flow_style: bool | None = None) -> yaml.Node:
        is_plain = not any(isinstance(value, (list, dict)) for value in sequence)
        return super().represent_sequence(tag, sequence, flow_style=is_plain)


class RunFolder(Result):
    """Paths of one run, and their content.

    Args:
        path: the folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.is_new = False  # whether `held` has created it
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
        self.mlflow = self.path / "mlflow"
        self.figures = self.path / "figures"
        self.scores = self.path / "scores.json"
        self.page = self.path / "report.html"

    def __fspath__(self) -> str:
        """The path, so that a run can be used wherever a path can."""
        return str(self.path)

    def text(self) -> str:
        """Progress and results of the run, and where its encoder is."""
        found = self.to_dict()
        lines = [f"run folder {printable(self.path)}"]
        if last := found["metrics"]:
            loss = last.get("train/loss")
            lines.append(f"step {last['step']:,}" + (f", loss {decimals(loss)}" if loss is not None else ""))
        if found["health"]:
            lines.append(f"health: {found['health'].get('verdict')}")
        if found["scores"]:
            lines.append(self.scores_in_words())
        lines.append(f"encoder in {self.encoder}" if found["encoder"] else "no encoder yet")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The paths of folder and encoder, the last line of metrics, the scores and the health."""
        lines = self.read_metrics()
        return {
            "path": str(self.path), "encoder": str(self.encoder) if (self.encoder / "encoder.json").exists() else None,
            "metrics": lines[-1] if lines else None, "scores": read_json(self.scores),
            "health": read_json(self.health),
        }  # fmt: skip

    def scores_in_words(self) -> str:
        """The scores of a fine-tuning run in words."""
        found = json.loads(self.scores.read_text())
        among = "" if found["top5"] is None else f", top-5 {found['top5']:.1f} %"
        same = " (those that it was trained on: it says nothing of others)" if found.get("is_training_data") else ""
        return (
            f"top-1 accuracy {found['top1']:.1f} %{among} on {found['images']:,} images of {found['val']}{same}, after "
            f"the last step; more in {self.scores}"
        )

    def held(self, waits: bool) -> AbstractContextManager[None]:
        """Lock the folder for this process while the block runs.

        Args:
            waits: Whether to wait a little for an earlier process that is ending, such as that of a requeued job.

        Raises:
            ValueError: another process has locked it, or it is a file.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{printable(self.path)}: is a file. Choose another run folder.")
        self.is_new = not self.path.exists()
        return lock_folder(self.path, "go on with this run", LOCK, WAIT_SECONDS if waits else 0.0)

    @property
    def checkpoints(self) -> list[Path]:
        """The last checkpoint and those that are kept by their step, newest first."""
        kept = sorted(self.checkpoint.parent.glob(NAMED), reverse=True)
        return [path for path in (self.checkpoint, *kept) if path.is_file()]

    @property
    def resume_command(self) -> str:
        """The command that resumes the run; a call in Python if the run was given objects."""
        given = self.given_from_python() if self._kind_of_config() == "run" else {}
        return self.resume_call(given) if given else f"sslvit resume {shlex.quote(str(self.path))}"

    def given_from_python(self) -> dict[str, str]:
        """Descriptions in config.yaml, by dotted key, of settings that were given as objects."""
        before = by_dotted_key(self.read_config())
        return {key: before[key] for key in GIVEN_AS if is_given(before.get(key))}

    def resume_call(self, given: Iterable[str]) -> str:
        """The call in Python that resumes a run that was given objects for these settings."""
        words = [f"**{{'{key}': ...}}" if GIVEN_AS[key] == key else f"{GIVEN_AS[key]}=..." for key in given]
        return f"sslvit.resume({', '.join([repr(str(self.path)), *words])})"

    @property
    def goes_on(self) -> bool:
        """Whether there is a checkpoint to resume from."""
        return bool(self.checkpoints)

    def check(self, resume: bool, overwrite: bool) -> None:
        """Check that the folder may be used; nothing is changed. A run without a checkpoint may always be replaced.

        Raises:
            ValueError: the folder holds more than the beginning of a run and neither flag is given, both flags are
                given, or it is not a run to resume or overwrite.
        """
        if resume and overwrite:
            raise ValueError("--resume and --overwrite exclude each other: go on with the old run, or start anew?")
        found = {entry.name for entry in self.path.iterdir()} - {LOCK}
        if not found and not resume:
            return
        if not self.is_new and self.has_only_begun(found):
            logger.info(f"{printable(self.path)}: a run that ended before its first checkpoint; it starts at step 0")
            return
        if resume and not self.goes_on:
            instead = "Start without --resume." if self.is_new else "Copy it back, or start anew with --overwrite."
            raise ValueError(
                f"resume: {printable(self.path)} has no checkpoint (checkpoints/{self.checkpoint.name}). {instead}"
            )
        if not resume and not overwrite:
            resume_hint = "It has no checkpoint to go on from: pass"
            if self.goes_on:
                resume_hint = f"To go on with it: {printable(self.resume_command)}. Or pass"
            raise ValueError(
                f"{printable(self.path)}: already exists. {resume_hint} --overwrite to start anew, or choose another "
                "--out."
            )
        if overwrite and not self.is_run:
            raise ValueError(
                f"{printable(self.path)}: not a run folder (no config.yaml of a run), so it is left alone."
            )

    def has_only_begun(self, found: set[str]) -> bool:
        """Whether the folder holds only what a run writes before its first checkpoint.

        Args:
            found: Names in the folder.
        """
        made = {name for name in found if not name.endswith(".part")}
        config = self._kind_of_config()
        is_first_write = config == "none" and made <= {"config.yaml", "checkpoints"}
        if not made <= BEGUN or not (config == "run" or is_first_write):
            return False
        inside = list(self.checkpoint.parent.iterdir()) if self.checkpoint.parent.is_dir() else []
        if any(path.suffix != ".part" and path.name != SHARDS for path in inside):
            return False
        lines = self.read_metrics()
        # a background writer may be killed as late as at the second one; later, the first one has been deleted
        return not lines or lines[-1]["step"] < 2 * self._steps_to_first_checkpoint()

    @property
    def has_diverged_at_start(self) -> bool:
        """Whether the run ended because its numbers were not finite, before its first checkpoint."""
        found = {entry.name for entry in self.path.iterdir()} - {LOCK} if self.incident.is_dir() else set()
        return bool(found) and self.has_only_begun(found - {self.incident.name})

    @property
    def is_run(self) -> bool:
        """Whether a run has made the folder, even if its config.yaml is damaged."""
        config, made = self._kind_of_config(), (self.checkpoint, self.metrics, self.encoder / "encoder.json")
        return config == "run" or (self.config.exists() and config != "other" and any(path.is_file() for path in made))

    def _kind_of_config(self) -> Literal["run", "none", "damaged", "other"]:
        """Whether config.yaml is that of a run; "none" if it is missing or empty."""
        try:
            content = yaml.safe_load(self.config.read_text()) if self.config.exists() else None
        except (OSError, *YAML_ERRORS):
            return "damaged"
        if content is None:
            return "none"
        return "run" if isinstance(content, dict) and content.keys() >= SECTIONS else "other"

    def _steps_to_first_checkpoint(self) -> int:
        train = self.read_config()["train"]
        every = train.get("checkpoint_every") if isinstance(train, dict) else None
        return every if isinstance(every, int) else 1

    def start(self, settings: dict[str, Any], goes_on: bool) -> None:
        """Make the folder, write config.yaml, and delete an earlier run's files unless the run is resumed.

        The new settings are written before anything is deleted. The encoder of a resumed run stays until there is a
        newer checkpoint.
        """
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        for folder in (self.path, self.encoder, self.figures, self.samples, self.incident):
            for name in {left.name.rsplit(".", 2)[0] for left in folder.glob("*.*.part")}:
                remove_stale_temporaries(folder / name)
        earlier = self.made_by() if goes_on else []
        settings = {**settings, MADE_BY: [*earlier, describe_process()]}
        with new_file(self.config) as temporary:
            self._write_config(settings, temporary)
            if not goes_on:
                self._delete_run()
        self.checkpoint.parent.mkdir(exist_ok=True)

    def start_branch(self, source: RunFolder, step: int) -> None:
        """Write config.yaml of a copy of a run at a step: its settings, and what has run it so far."""
        made = [*source.made_by(), {BRANCHED_FROM: str(source.path), "step": step, **describe_process()}]
        self._write_config({**source.read_config(), MADE_BY: made}, self.config)

    @staticmethod
    def _write_config(content: dict[str, Any], path: Path) -> None:
        path.write_text(yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=120))

    def _delete_run(self) -> None:
        """Delete what a run made, except its config.yaml; other files beside its checkpoints stay."""
        folder = self.checkpoint.parent
        for made in (self.checkpoint, *folder.glob(NAMED), *folder.glob("*.part"), *self.path.glob("*.jsonl.*.part")):
            made.unlink(missing_ok=True)
        logs = (self.tensorboard, self.wandb, self.mlflow)
        for made in (folder / SHARDS, self.figures, self.samples, self.incident, *logs, self.encoder):
            shutil.rmtree(made, ignore_errors=True)
        for made in (self.metrics, self.ledger, self.health, self.scores):
            made.unlink(missing_ok=True)
        if self.page.exists() and is_page(self.page, PAGE):
            self.page.unlink()

    def newest_checkpoint(self) -> Path:
        """The newest checkpoint with a valid checksum; a damaged one is reported, and the one before it is used.

        Raises:
            ValueError: none is intact.
        """
        problem: Exception | None = None
        damaged = set()
        for path in self.checkpoints:
            about = path.stat()
            if (about.st_dev, about.st_ino) in damaged:
                continue  # the same file by its other name
            try:
                check_checkpoint(path)
            except (ValueError, OSError) as error:
                logger.warning(f"{error}")
                problem = problem or error
                damaged.add((about.st_dev, about.st_ino))
                continue
            if path != self.checkpoint:
                logger.info(f"going on from the checkpoint before it: {printable(path)}")
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
            with new_file(path) as temporary, open(temporary, "w") as new:
                new.writelines(text for text, line in read_lines(path) if line["step"] < step)

    def read_config(self) -> dict[str, Any]:
        """The settings in config.yaml.

        Raises:
            ValueError: it is missing or damaged.
        """
        try:
            content = yaml.safe_load(self.config.read_text())
        except (OSError, *YAML_ERRORS) as error:
            reason = printable(" ".join(str(error).split()), 120)
            raise ValueError(f"{printable(self.config)}: not the settings of a run ({reason}).") from error
        if not isinstance(content, dict):
            raise ValueError(f"{printable(self.config)}: holds no settings, so the run cannot go on.")
        content.pop(MADE_BY, None)
        return content

    def made_by(self) -> list[Any]:
        """The processes that have run it so far, from config.yaml; none if that is missing or damaged."""
        try:
            content = yaml.safe_load(self.config.read_text())
        except (OSError, *YAML_ERRORS):
            return []
        found = content.get(MADE_BY) if isinstance(content, dict) else None
        return found if isinstance(found, list) else []

    def read_metrics(self) -> list[dict[str, float]]:
        """The lines of metrics.jsonl; a null there is a number that was not finite."""
        lines = [line for _, line in read_lines(self.metrics)] if self.metrics.exists() else []
        return [{name: math.nan if value is None else value for name, value in line.items()} for line in lines]

    def history(self) -> dict[str, np.ndarray]:
        """Every metric as an array with one number for each logged step, NaN where a step has no finite number.

        Example:
            pandas.DataFrame(run.history())
        """
        lines = self.read_metrics()
        names = dict.fromkeys(name for line in lines for name in line)
        return {name: np.array([_finite(line.get(name)) for line in lines]) for name in names}

    def cut_metrics(self, step: int) -> None:
        """Drop lines after a checkpoint's step, which the resumed run will write again."""
        kept = [line for line in self.read_metrics() if line["step"] <= step]
        write_atomically(self.metrics, "".join(to_json(line) + "\n" for line in kept))


def _finite(value: object) -> float:
    """The value if it is a finite number, else NaN."""
    return value if isinstance(value, (int, float)) and abs(value) < sys.float_info.max else math.nan


def named_step(checkpoint: Path) -> int:
    """The step in the name of a checkpoint that is kept by its step (NAMED)."""
    return int(checkpoint.stem.removeprefix("step-"))


def read_json(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file of a run; None if it is missing or damaged."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def append_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """Append lines to a run's .jsonl.

    Raises:
        WriteError: the disk is full or cannot be written to.
    """
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write("".join(to_json(line) + "\n" for line in lines))
    except OSError as error:
        raise write_error(path, error) from error


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(text, content) of the lines of a run's .jsonl; damaged lines are skipped with a warning.

    An incomplete last line, which a killed run may leave, is skipped without one.
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
        logger.warning(f"{printable(path)}: line {bad[0]}{more} damaged and passed over")
