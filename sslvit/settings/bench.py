"""A matrix of encoders x protocols x data sets, from one YAML."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from sslvit.files import brief, expand_path, printable, quoted
from sslvit.settings.choices import checked
from sslvit.settings.load import build, read_yaml, recipe_names, recipes_folder
from sslvit.settings.probe import ProbeSettings
from sslvit.settings.protocols import PROTOCOLS, LogregSettings, ProtocolSettings

BASELINES = ("pixels", "untrained", "scratch")
PIXELS = "raw pixels"  # the name of that row
GIVEN = (
    "seed",
    "out",
    "init",
    "data.shards",
    "task.val",
    "train.accelerator",
    "task",
    "train",
    "data",
    "encoder",
    "optim",
)


@dataclass
class SplitSettings:
    """A data set."""

    train: str
    """Labeled shards (or a folder of images) that heads are fitted on and fine-tuning trains on."""
    val: str
    """Labeled shards that are scored, and never used to choose anything."""

    def __post_init__(self) -> None:
        self.train, self.val = expand_path(self.train), expand_path(self.val)


@dataclass
class FinetuneColumn:
    """Fine-tuning: the column of accuracies after the last step."""

    config: str = "finetune/small_images"
    """Name of a recipe, or a YAML file."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Settings that change the recipe, by dotted key."""


@dataclass
@checked("")
class ProbeColumn:
    """A column of scores on frozen features."""

    kind: Literal["linear", "few", "knn"] = "linear"
    """What the column shows: linear (a linear probe), few (logistic regression on few labels) or knn."""
    protocol: ProtocolSettings = field(default_factory=LogregSettings)
    """Protocol of the linear probe."""
    labels_per_class: int | None = None
    """Number of labels per class in a column of few labels."""
    labels_percent: float | None = None
    """Percentage of each class's labels in a column of few labels."""
    draws: int = 5
    """Number of random subsets of the labels that are averaged."""
    neighbors: int = 20
    """Number k of neighbors that vote."""
    temperature: float = 0.07
    """Temperature of the neighbors' vote."""
    layer: int | None = None
    """Number of the block whose output is probed; null for the encoder's default."""
    blocks: int = 1
    """Number of consecutive blocks, ending with that one, whose features are concatenated."""
    pooling: str | None = None
    """Pooling of the tokens; null for the encoder's default."""

    def settings(self, split: SplitSettings, **more: Any) -> ProbeSettings:
        """As `sslvit probe` takes them."""
        given = {key: getattr(self, key) for key in ("temperature", "layer", "blocks", "pooling", "draws")}
        given["protocol"] = self.protocol if self.kind == "linear" else None
        if self.kind == "few":
            given |= {"labels_per_class": self.labels_per_class, "labels_percent": self.labels_percent}
        given["neighbors"] = [self.neighbors] if self.kind == "knn" else []
        return ProbeSettings(split.train, split.val, **given, **more)


@dataclass(kw_only=True)
@checked("")
class BenchOptions:
    """What a bench says besides its rows and columns."""

    baselines: list[str] = field(default_factory=lambda: list(BASELINES))
    """Rows besides the encoders: pixels, untrained (the same architectures with fresh weights) and scratch (the same
    architectures trained with labels, then scored like the others).
    """
    seeds: int = 1
    """Number of seeds, untrained weights included."""
    seed: int = 0
    """First seed."""
    max_unreadable_fraction: float = 0.01
    """Fraction of a data set's images that may be unreadable; these are skipped and counted."""
    batch: int = 256
    """Images per forward pass."""
    workers: int = 0
    """Number of loader processes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the encoder and the heads; auto is a GPU where there is one."""
    out: str | None = None
    """Folder for all results; null for runs/bench-NAME."""
    name: str = "bench"
    """Name of the bench, that of its YAML."""

    def __post_init__(self) -> None:
        self.out = expand_path(self.out or f"runs/bench-{self.name}")
        for key, least in (("seeds", 1), ("batch", 1), ("seed", 0), ("workers", 0)):
            if getattr(self, key) < least:
                raise ValueError(f"{key}: {getattr(self, key)} must be {least} or more.")
        if not 0 <= self.max_unreadable_fraction < 1:
            raise ValueError(f"max_unreadable_fraction: {self.max_unreadable_fraction} must be from 0 to below 1.")
        wrong = [one for one in self.baselines if one not in BASELINES]
        if wrong:
            raise ValueError(f"baselines: {brief(wrong[0])} is not one of {', '.join(BASELINES)}.")


@dataclass(kw_only=True)
class BenchSettings(BenchOptions):
    """What is compared with what; and the options."""

    data: dict[str, SplitSettings]
    """Data sets by name."""
    encoders: dict[str, list[str]]
    """Rows by name: an encoder, or several of one architecture from several seeds, whose mean is shown with an
    interval.
    """
    columns: dict[str, ProbeColumn | FinetuneColumn]
    """Columns of the table by name."""
    scratch: FinetuneColumn = field(default_factory=FinetuneColumn)
    """How the baseline from scratch is trained where no column is a fine-tuning."""


def load_bench(path: str | Path, changes: dict[str, Any]) -> BenchSettings:
    """Read and check a bench's YAML before any work.

    Args:
        path: of the file, or the name of one in configs/, such as bench/cifar10.
        changes: top-level settings, such as {"out": "runs/bench"}.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown key or a value that does not fit; the message names file and key.
    """
    path = _find_bench(path)
    tree = read_yaml(path) | changes
    try:
        return _read({**tree, "name": path.stem})
    except ValueError as error:
        raise ValueError(f"{printable(path)}: {error}") from error


def _find_bench(name: str | Path) -> Path:
    """The file behind a path or a name in configs/."""
    path, ours = Path(expand_path(name)), recipe_names("bench")
    if str(name) in ours:
        return recipes_folder() / f"{name}.yaml"
    start = f"Start from one that comes with sslvit: {', '.join(ours)}."
    if path.is_dir():
        raise ValueError(f"{printable(path)}: a folder, not the YAML of a bench. {start}")
    if not path.exists():
        raise FileNotFoundError(f"{printable(path)}: no such file. {start}")
    return path


def _read(tree: dict[str, Any]) -> BenchSettings:
    known = [field.name for field in fields(BenchSettings)]
    for key in tree:
        if key not in known:
            raise ValueError(f"{brief(key)}: no such key. Known: {', '.join(known)}.")
    for key in ("data", "encoders", "columns"):
        if not isinstance(tree.get(key), dict) or not tree[key]:
            raise ValueError(f"{key}: expected at least one name and what it stands for.")
        for name in tree[key]:
            if not isinstance(name, str) or not name or set(name) & set("/|\\\n") or name == PIXELS or len(name) > 100:
                raise ValueError(f"{key}: {quoted(name)} is no name for a table. Use a few words, without / and |.")
    data = {name: _built(SplitSettings, value, f"data.{brief(name)}") for name, value in tree["data"].items()}
    encoders = {}
    for name, value in tree["encoders"].items():
        encoders[name] = [value] if isinstance(value, str) else value
        if not isinstance(value, (str, list)) or not value or not all(isinstance(one, str) for one in encoders[name]):
            raise ValueError(f"encoders.{brief(name)}: expected an encoder, or a list of them.")
        encoders[name] = [expand_path(one) for one in encoders[name]]
    columns = {name: _column(value, f"columns.{brief(name)}") for name, value in tree["columns"].items()}
    plain = {key: value for key, value in tree.items() if key not in ("data", "encoders", "columns", "scratch")}
    options = build(BenchOptions, plain)
    scratch = _finetune(tree.get("scratch", {}), "scratch")
    return BenchSettings(data=data, encoders=encoders, columns=columns, scratch=scratch, **vars(options))


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
    if not isinstance(name, str) or name not in PROTOCOLS:
        raise ValueError(f"{where}.protocol: {brief(name)} is not one of {', '.join(PROTOCOLS)}.")
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
    for key in GIVEN:
        if key in value:
            what = "Give its keys with dots, as in train.steps" if isinstance(value[key], dict) else "The bench sets it"
            raise ValueError(f"{where}.{key}: cannot stand here. {what}.")
    for key in value:
        if not isinstance(key, str):
            raise ValueError(f"{where}: {brief(key)} is no key of a recipe. Give keys with dots, as in train.steps.")
    config = value.get("config", FinetuneColumn.config)
    if not isinstance(config, str):
        raise ValueError(f"{where}.config: {brief(config)} is not a recipe's name.")
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
