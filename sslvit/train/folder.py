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
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import yaml


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

    def check(self, resume: bool, overwrite: bool) -> None:
        """Whether the folder may be used so; nothing is touched.

        Raises:
            ValueError: it exists and neither flag is given, both are, or it is not a run to resume or overwrite.
        """
        if resume and overwrite:
            raise ValueError("--resume and --overwrite exclude each other: go on with the old run, or start anew?")
        is_used = self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir()))
        if resume and not self.checkpoint.exists():
            raise ValueError(f"--resume: {self.path} has no checkpoint ({self.checkpoint}). Start without --resume.")
        if is_used and not (resume or overwrite):
            raise ValueError(f"{self.path}: already exists. Pass --resume to go on, or --overwrite to start anew.")
        if is_used and overwrite and not (self.config.exists() and self.checkpoint.parent.is_dir()):
            raise ValueError(f"{self.path}: not a run folder (no config.yaml and checkpoints/), so it is left alone.")

    def start(self, settings: dict[str, Any], resume: bool) -> None:
        """Make the folder and write down what runs; an earlier run's files go, unless the run goes on."""
        if not resume:
            folders = (self.figures, self.samples, self.incident, self.tensorboard, self.wandb)
            for made in (self.checkpoint.parent, *folders):
                shutil.rmtree(made, ignore_errors=True)
            for made in (self.metrics, self.ledger, self.health, self.scores):
                made.unlink(missing_ok=True)
        shutil.rmtree(self.encoder, ignore_errors=True)  # the checkpoint is newer from now on
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        self.config.write_text(yaml.dump(settings, Dumper=_Dumper, sort_keys=False, width=120))

    def samples_read(self, rank: int) -> Path:
        """The file of a rank's sample keys."""
        self.samples.mkdir(exist_ok=True)
        return self.samples / f"rank-{rank:05d}.jsonl"

    def cut_samples_read(self, step: int) -> None:
        """Drop samples of steps after a checkpoint's, which the resumed run will read again."""
        for path in self.samples.glob("rank-*.jsonl"):
            part = path.with_suffix(".part")
            with open(path) as old, open(part, "w") as new:
                new.writelines(line for line in old if line.endswith("\n") and json.loads(line)["step"] < step)
            os.replace(part, path)

    def read_config(self) -> dict[str, Any]:
        """What config.yaml says.

        Raises:
            ValueError: it is missing or damaged.
        """
        try:
            content = yaml.safe_load(self.config.read_text())
        except (OSError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())[:120]
            raise ValueError(f"--resume: {self.path} is not a run of sslvit that can go on ({reason}).") from error
        if not isinstance(content, dict):
            raise ValueError(f"--resume: {self.config} holds no settings, so the run cannot go on.")
        return content

    def read_metrics(self) -> list[dict[str, float]]:
        """The lines of metrics.jsonl."""
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_text().split("\n")
        return [json.loads(line) for line in lines[:-1]]  # a killed run may leave half a line behind the last break

    def cut_metrics(self, step: int) -> None:
        """Drop lines after a checkpoint's step, which the resumed run will write again."""
        kept = [line for line in self.read_metrics() if line["step"] <= step]
        part = self.metrics.with_suffix(".part")
        part.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(part, self.metrics)
