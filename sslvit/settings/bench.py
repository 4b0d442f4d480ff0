"""A matrix of encoders x protocols x data sets, from one YAML."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from sslvit.settings.load import build
from sslvit.settings.probe import ProbeSettings
from sslvit.settings.protocols import PROTOCOLS, LogregSettings, ProtocolSettings

BASELINES = ("pixels", "untrained", "scratch")


@dataclass
class SplitSettings:
    """A data set.

    Args:
        train: labelled shards that heads are fitted on and fine-tuning trains on.
        val: labelled shards that are reported, and never used to choose anything.
    """

    train: str
    val: str


@dataclass
class FinetuneColumn:
    """Fine-tuning: the column of accuracies after the last step.

    Args:
        config: a recipe.
        changes: other settings by dotted key.
    """

    config: str = "finetune/small_images"
    changes: dict[str, Any] = field(default_factory=dict)


@dataclass
class ProbeColumn:
    """A column of scores on frozen features.

    Args:
        kind: linear, few (labels) or knn.
        protocol: of the linear probe.
        labels_per_class: of a column with few labels.
        labels_percent: of a column with few labels.
        draws: random choices of those labels.
        neighbours: k of a column of neighbours.
        temperature: of the neighbours' vote.
        layer: block that is probed; null for the encoder's own choice.
        blocks: how many blocks that end there are put side by side.
        pooling: of the tokens; null for the encoder's own choice.
    """

    kind: Literal["linear", "few", "knn"] = "linear"
    protocol: ProtocolSettings = field(default_factory=LogregSettings)
    labels_per_class: int | None = None
    labels_percent: float | None = None
    draws: int = 5
    neighbours: int = 20
    temperature: float = 0.07
    layer: int | None = None
    blocks: int = 1
    pooling: str | None = None

    def settings(self, split: SplitSettings, **more: Any) -> ProbeSettings:
        """As `sslvit probe` takes them."""
        given = {key: getattr(self, key) for key in ("temperature", "layer", "blocks", "pooling", "draws")}
        given["protocol"] = self.protocol if self.kind == "linear" else None
        if self.kind == "few":
            given |= {"labels_per_class": self.labels_per_class, "labels_percent": self.labels_percent}
        given["neighbours"] = [self.neighbours] if self.kind == "knn" else []
        return ProbeSettings(split.train, split.val, **given, **more)


@dataclass
class BenchSettings:
    """What is compared with what.

    Args:
        data: data sets by name.
        encoders: rows by name: an encoder, or a list of them from several seeds, whose mean is shown with an interval.
        columns: protocols by name.
        baselines: rows besides them: pixels, untrained (the same networks with fresh weights) and scratch (the same
            networks trained with labels, then scored like the others).
        scratch: how the last ones are trained.
        seeds: how often everything by chance is drawn anew, untrained weights included.
        seed: the first of them.
        batch: images per forward pass.
        workers: loader processes.
        device: auto, cpu or cuda.
        out: folder for all of it.
    """

    data: dict[str, SplitSettings]
    encoders: dict[str, list[str]]
    columns: dict[str, ProbeColumn | FinetuneColumn]
    baselines: list[str] = field(default_factory=lambda: list(BASELINES))
    scratch: FinetuneColumn = field(default_factory=FinetuneColumn)
    seeds: int = 1
    seed: int = 0
    batch: int = 256
    workers: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    out: str = "runs/bench"


def load_bench(path: str | Path, changes: dict[str, Any]) -> BenchSettings:
    """Read and check a bench's YAML before any work.

    Args:
        path: of the file.
        changes: top-level settings, such as {"out": "runs/bench"}.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown key or a value that does not fit; the message names file and key.
    """
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not readable as YAML ({' '.join(str(error).split())[:160]}).") from error
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file. Start from configs/bench/cifar10.yaml.") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: expected keys and values, found {type(tree).__name__}.")
    tree |= changes
    try:
        return _read(tree)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read(tree: dict[str, Any]) -> BenchSettings:
    known = [field.name for field in fields(BenchSettings)]
    for key in tree:
        if key not in known:
            raise ValueError(f"{key}: no such key. Known: {', '.join(known)}.")
    for key in ("data", "encoders", "columns"):
        if not isinstance(tree.get(key), dict) or not tree[key]:
            raise ValueError(f"{key}: expected at least one name and what it stands for.")
    data = {name: _built(SplitSettings, value, f"data.{name}") for name, value in tree["data"].items()}
    for name, split in data.items():
        if not (split.train and split.val):
            raise ValueError(f"data.{name}: needs train and val.")
    encoders = {}
    for name, value in tree["encoders"].items():
        encoders[name] = [value] if isinstance(value, str) else value
        if not isinstance(encoders[name], list) or not all(isinstance(one, str) for one in encoders[name]):
            raise ValueError(f"encoders.{name}: expected an encoder, or a list of them.")
    columns = {name: _column(value, f"columns.{name}") for name, value in tree["columns"].items()}
    plain = {key: value for key, value in tree.items() if key not in ("data", "encoders", "columns", "scratch")}
    baselines = plain.get("baselines", list(BASELINES))
    if not isinstance(baselines, list) or set(baselines) - set(BASELINES):
        raise ValueError(f"baselines: {baselines} is not a list of {', '.join(BASELINES)}.")
    scratch = _finetune(tree.get("scratch", {}), "scratch")
    for key in ("seeds", "batch"):
        if not isinstance(plain.get(key, 1), int) or plain.get(key, 1) < 1:
            raise ValueError(f"{key}: {plain[key]} must be a whole number from 1.")
    return BenchSettings(data, encoders, columns, scratch=scratch, **plain)


def _column(value: Any, where: str) -> ProbeColumn | FinetuneColumn:
    value = {"kind": value} if isinstance(value, str) else value
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected linear, few, knn, finetune, or keys such as kind.")
    kind = value.get("kind", "linear")
    if kind == "finetune":
        return _finetune({key: part for key, part in value.items() if key != "kind"}, where)
    protocol = value.get("protocol", "logreg")
    protocol = {"name": protocol} if isinstance(protocol, str) else protocol
    name = protocol.get("name") if isinstance(protocol, dict) else None
    if name not in PROTOCOLS:
        raise ValueError(f"{where}.protocol: {name} is not one of {', '.join(PROTOCOLS)}.")
    read = _built(PROTOCOLS[name], {k: v for k, v in protocol.items() if k != "name"}, f"{where}.protocol")
    rest = {key: part for key, part in value.items() if key != "protocol"}
    column = _built(ProbeColumn, rest, where, {"protocol": LogregSettings})
    column.protocol = read
    if column.kind == "few" and (column.labels_per_class is None) == (column.labels_percent is None):
        raise ValueError(f"{where}: few labels need labels_per_class or labels_percent.")
    column.settings(SplitSettings("", ""))  # what `sslvit probe` refuses
    return column


def _finetune(value: Any, where: str) -> FinetuneColumn:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected config and changes by dotted key.")
    config = value.get("config", FinetuneColumn.config)
    return FinetuneColumn(config, {key: part for key, part in value.items() if key != "config"})


def _built(kind: type, value: Any, where: str, kinds: dict[str, type] | None = None):
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected keys and values.")
    try:
        return build(kind, value, kinds)
    except TypeError as error:
        raise ValueError(f"{where}: {str(error).split('()')[-1].strip()}.") from error
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from error
