"""Settings of a benchmark of encoders x protocols x data sets, from one YAML file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from sslvit.files import brief, expand_path, printable, quoted
from sslvit.settings.build import build
from sslvit.settings.choices import Choice, checked
from sslvit.settings.load import check_changes, find_recipe, read_yaml, set_keys
from sslvit.settings.probe import BlocksReadout, FewLabels, Passes, ProbeSettings, UnreadableImages
from sslvit.settings.protocols import PROTOCOL_CHOICE, LogregSettings, ProtocolSettings

BASELINES = ("pixels", "untrained", "scratch")
PIXELS = "raw pixels"  # name of the row of the baseline pixels
# keys that a bench sets itself, and sections, whose keys a column must give with dots
NOT_OF_A_COLUMN = (
    "seed", "out", "init", "data.shards", "task.val", "train.accelerator", "task", "train", "data", "encoder", "optim",
)  # fmt: skip


@dataclass
class SplitSettings:
    """A data set."""

    train: str
    """Labeled shards (or a folder of images) that heads are fitted on and fine-tuning trains on."""
    val: str
    """Labeled shards for evaluation, which are never used to choose anything."""

    def __post_init__(self) -> None:
        self.train, self.val = expand_path(self.train), expand_path(self.val)


@dataclass
@checked("")
class FinetuneColumn:
    """A column of fine-tuning: accuracies after the last step."""

    config: str = "finetune/small_images"
    """Name of a recipe, or a YAML file."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Settings that change the recipe, by dotted key."""
    kind: Literal["finetune"] = "finetune"
    """Name of this kind of column."""


@dataclass(kw_only=True)
@checked("")
class ProbeColumn(FewLabels, BlocksReadout):
    """A column of scores on frozen features."""

    kind: Literal["linear", "few", "knn"] = "linear"
    """Kind of evaluation: linear (a linear probe), few (logistic regression on few labels) or knn."""
    protocol: Annotated[ProtocolSettings, PROTOCOL_CHOICE] = field(default_factory=LogregSettings)
    """Protocol of the linear probe."""
    neighbors: int = 20
    """Number k of neighbors that vote."""
    temperature: float = 0.07
    """Temperature of the neighbors' vote."""
    whiten: bool = False
    """Whiten features before the neighbor search."""

    def __post_init__(self) -> None:
        if self.kind == "few" and (self.labels_per_class is None) == (self.labels_percent is None):
            raise ValueError("few labels need labels_per_class or labels_percent.")
        if self.whiten and self.kind != "knn":
            raise ValueError(f"whiten: is for kind knn, not {self.kind}.")
        self.settings(SplitSettings("", ""))  # same checks as `sslvit probe`

    def settings(self, split: SplitSettings, **more: Any) -> ProbeSettings:
        """Convert to the settings of `sslvit probe`."""
        given = {key: getattr(self, key) for key in ("temperature", "whiten", "layer", "blocks", "pooling", "draws")}
        given["protocol"] = self.protocol if self.kind == "linear" else None
        if self.kind == "few":
            given |= {"labels_per_class": self.labels_per_class, "labels_percent": self.labels_percent}
        given["neighbors"] = [self.neighbors] if self.kind == "knn" else []
        return ProbeSettings(split.train, split.val, **given, **more)


COLUMNS = Choice("kind", "linear", {**dict.fromkeys(("linear", "few", "knn"), ProbeColumn), "finetune": FinetuneColumn})


@dataclass(kw_only=True)
@checked("")
class BenchSettings(Passes, UnreadableImages):
    """The encoders, data sets and protocols to compare."""

    data: dict[str, SplitSettings]
    """Data sets by name."""
    encoders: dict[str, list[str]]
    """Rows by name: an encoder, or several of one architecture from different seeds, whose mean is shown with an
    interval."""
    columns: dict[str, Annotated[ProbeColumn | FinetuneColumn, COLUMNS]]
    """Columns of the table by name."""
    scratch: FinetuneColumn = field(default_factory=FinetuneColumn)
    """Training of the baseline from scratch if no column is a fine-tuning."""
    allow_same_data: bool = False
    """Allow the same images for training and validation, although the scores then say nothing about other images."""
    baselines: list[str] = field(default_factory=lambda: list(BASELINES))
    """Rows besides the encoders: pixels, untrained (the same architectures with fresh weights) and scratch (the same
    architectures trained with labels, then scored like the others)."""
    size: str | int | list[int] | None = None
    """Input size of frozen encoders in pixels, such as 64, 48x64 or [48, 64]; null for each encoder's own. Columns of
    fine-tuning use encoder.image_size.
    """
    seeds: int = 1
    """Number of seeds, also for untrained weights."""
    seed: int = 0
    """First seed."""
    out: str | None = None
    """Folder for all results; null for runs/bench-NAME."""
    name: str = "bench"
    """Name of the bench; by default that of its YAML file."""

    def __post_init__(self) -> None:
        self.out = expand_path(self.out or f"runs/bench-{self.name}")
        super().__post_init__()
        wrong = [one for one in self.baselines if one not in BASELINES]
        if wrong:
            raise ValueError(f"baselines: {brief(wrong[0])} is not one of {', '.join(BASELINES)}.")


def load_bench(path: str | Path, changes: dict[str, Any]) -> BenchSettings:
    """Read the YAML file of a bench and check it completely before any work.

    Args:
        path: The file, or the name of one in configs/, such as bench/cifar10.
        changes: Settings by dotted key, such as {"out": "runs/bench"}.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: A key is unknown or a value is invalid; the message names file and key.
    """
    path = find_recipe(path, "bench", option="")
    tree = read_yaml(path) | {"name": path.stem}
    try:
        tree = _with_columns(tree)
        set_keys(BenchSettings, tree, _with_columns(changes))
        for key in ("data", "encoders", "columns"):
            _check_names(key, tree.get(key))
        for name, value in tree["encoders"].items():
            paths = [value] if isinstance(value, str) else value
            if not isinstance(paths, list) or not paths or not all(isinstance(one, str) for one in paths):
                raise ValueError(f"encoders.{brief(name)}: expected an encoder, or a list of them.")
            tree["encoders"][name] = [expand_path(one) for one in paths]
        settings = build(BenchSettings, tree)
        for name, column in settings.columns.items():
            if isinstance(column, FinetuneColumn):
                _check_column(column, f"columns.{name}")
        _check_column(settings.scratch, "scratch")
        return settings
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"{printable(path)}: {error}") from error


def _check_column(column: FinetuneColumn, where: str) -> None:
    try:
        check_changes(column.config, column.changes)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"{where}: {error}") from error


def check_sources(settings: BenchSettings) -> None:
    """Raise one error that lists all missing encoders and data sets, before anything is loaded."""
    named = {f"encoders.{row}": path for row, paths in settings.encoders.items() for path in paths}
    for name, split in settings.data.items():
        named |= {f"data.{name}.train": split.train, f"data.{name}.val": split.val}
    missing = [
        f"{key} ({printable(path)})"
        for key, path in named.items()
        if not set(path) & set(":{*?[")
        and not Path(path).exists()  # addresses, patterns and timm:NAME are not looked up
    ]
    if missing:
        raise FileNotFoundError(
            f"not there: {', '.join(missing)}. Make them first, by the commands at the top of the bench's YAML (sslvit "
            f"recipes shows those that come with sslvit), or name others: --{missing[0].split()[0]} PATH"
        )


def _check_names(key: str, entries: Any) -> None:
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f"{key}: expected at least one name and what it stands for.")
    for name in entries:
        if not isinstance(name, str) or not name or set(name) & set("/|\\\n") or name == PIXELS or len(name) > 100:
            raise ValueError(f"{key}: {quoted(name)} is no name for a table. Use a few words, without / and |.")


def _with_columns(given: dict[str, Any]) -> dict[str, Any]:
    """Normalize the columns in settings to the form of their dataclasses."""
    made = dict(given)
    for key, value in given.items():
        if key == "columns" and isinstance(value, dict):
            made[key] = {name: _column(of, f"columns.{brief(name)}") for name, of in value.items()}
        elif key.startswith("columns.") and key.count(".") == 1:
            made[key] = _column(value, brief(key))
        elif key == "scratch":
            made[key] = _column(value, key, "finetune")
    return made


def _column(value: Any, where: str, kind: str = "linear") -> Any:
    """Normalize a column: a single word becomes its kind, and keys of a recipe become its changes."""
    value = {"kind": value} if isinstance(value, str) else value
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected linear, few, knn, finetune, or keys such as kind.")
    if value.get("kind", kind) != "finetune":
        return value
    changes = {key: setting for key, setting in value.items() if key not in ("kind", "config")}
    if isinstance(changes.get("changes"), dict):  # already in the form of the dataclass
        changes |= changes.pop("changes")
    for key in changes:
        if key in NOT_OF_A_COLUMN:
            what = (
                "Give its keys with dots, as in train.steps" if isinstance(changes[key], dict) else "The bench sets it"
            )
            raise ValueError(f"{where}.{key}: cannot stand here. {what}.")
        if not isinstance(key, str):
            raise ValueError(f"{where}: {brief(key)} is no key of a recipe. Give keys with dots, as in train.steps.")
    column: dict[str, Any] = {"kind": "finetune", "changes": changes}
    return column | ({"config": value["config"]} if "config" in value else {})
