"""YAML and command line -> settings; whatever is wrong is said in one line before anything else happens."""

from __future__ import annotations

import difflib
import inspect
import re
import textwrap
import types
import typing
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from sslvit.files import brief, expand_path, printable, quoted
from sslvit.settings.choices import near
from sslvit.settings.encoder import EncoderSettings
from sslvit.settings.palette import UNIFORM, read_palette
from sslvit.settings.presets import preset_values
from sslvit.settings.protocols import PROTOCOLS, ProtocolSettings
from sslvit.settings.run import TASK_SETTINGS, RunSettings
from sslvit.settings.views import VIEW_SETTINGS

Settings = TypeVar("Settings")
# sections that are one of several records: the key that picks it, its default, and the records
CHOICES: dict[str, tuple[str, str, dict[str, type]]] = {
    "task": ("name", "mae", TASK_SETTINGS),
    "data.view": ("kind", "crop", VIEW_SETTINGS),
}
# what is given last puts these of the recipe aside, which would exclude it or win over it
SET_ASIDE = {"data.shards": "data.mixture", "data.mixture": "data.shards", "train.epochs": "train.steps"}
# other libraries' names for keys
USUAL_NAMES: dict[str, tuple[str, ...]] = {
    "lr": ("base_lr", "lrs"), "learning_rate": ("base_lr", "lrs"), "base_rate": ("base_lr", "lrs"),
    "blr": ("base_lr",), "wd": ("weight_decay",), "warmup": ("warmup_epochs",),
    "warmup_steps": ("warmup_epochs",), "clip": ("clip_grad",), "grad_clip": ("clip_grad",), "max_norm": ("clip_grad",),
    "batch_size": ("global_batch_size", "batch"), "batch": ("global_batch_size",), "bs": ("global_batch_size", "batch"),
    "num_workers": ("workers",), "teacher_temperature": ("teacher_temp",), "student_temperature": ("student_temp",),
    "warmup_teacher_temperature": ("warmup_teacher_temp",), "momentum_teacher": ("momentum",),
    "data_path": ("shards",), "data_dir": ("shards",), "output_dir": ("out",), "save_dir": ("out",),
    "max_epochs": ("epochs",), "num_epochs": ("epochs",), "max_steps": ("steps",), "num_steps": ("steps",),
    "gpus": ("devices",), "num_gpus": ("devices",), "num_nodes": ("nodes",), "amp": ("precision",),
    "img_size": ("image_size",), "input_size": ("image_size",), "patch_size": ("patch",), "embed_dim": ("width",),
    "hidden_size": ("width",), "num_heads": ("heads",), "num_layers": ("depth",), "layers": ("depth",),
    "drop_path_rate": ("drop_path",), "in_chans": ("channels",), "arch": ("preset",), "model": ("preset",),
    "grad_checkpointing": ("activation_checkpointing",), "gradient_checkpointing": ("activation_checkpointing",),
}  # fmt: skip
REMARKS = {"base_lr": " (the rate at a batch of 256)"}
# other libraries' names for values
USUAL_VALUES = {
    "train.precision": {
        "float32": ("32", "fp32", "f32", "32-true", "single", "full"),
        "bf16": ("bf16-mixed", "bf16-true", "bfloat16", "16", "fp16", "float16", "16-mixed", "half", "mixed"),
        "float64": ("64", "fp64", "f64", "64-true", "double"),
    },
    "train.accelerator": {"gpu": ("cuda",)},
}
EMPTY = "{}: an empty section. Put settings below it, or leave it out."
MAX_KEY = 100  # characters of a key or a value that are compared with known ones
MAX_INT = 2**63 - 1
# what reading YAML may raise: its constructors of dates and numbers have errors of their own for damaged ones
YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError, AttributeError, TypeError, KeyError, OverflowError)
MAX_YAML_BYTES = 2**23
MAX_YAML_VALUES = 500_000  # aliases make few bytes stand for any number of values


def load_recipe(
    config: str | Path, changes: dict[str, Any] | None = None, base: EncoderSettings | None = None
) -> RunSettings:
    """The settings of a recipe with changes.

    Args:
        config: a YAML file, or the name of one in configs/ such as mae/digits.
        changes: dotted keys and their values, such as {"train.epochs": 10}; they win over the recipe.
        base: the encoder that the recipe's settings change; None for one that it describes itself.

    Raises:
        FileNotFoundError: no such recipe (the nearest names are shown).
        ValueError: an unknown key (the nearest is suggested), or a value that does not fit.
    """
    path = find_recipe(config)
    tree = read_yaml(path)
    changes = changes or {}
    if isinstance(tree.get("data"), dict) and tree["data"].get("allow_pipe") and not changes.get("data.allow_pipe"):
        raise ValueError(f"{path}: data.allow_pipe is for you to give, not for a file: --data.allow_pipe true")
    for given, other in SET_ASIDE.items():
        if given in changes and other not in changes:
            _drop(tree, other)
    if "encoder.preset" in changes:
        for key in preset_values(changes["encoder.preset"]):
            _drop(tree, f"encoder.{key}")  # what the recipe spells out of it
    for section, (key, default, _) in CHOICES.items():
        if f"{section}.{key}" in changes and changes[f"{section}.{key}"] != _chosen(tree, section, key, default):
            _put(tree, section, {})  # the recipe's other keys there belong to its own choice
    for key, value in changes.items():
        _put(tree, key, value)
    kinds = {}
    for section, (key, default, choices) in CHOICES.items():
        name = _chosen(tree, section, key, default)
        if not isinstance(name, str) or name not in choices:
            raise ValueError(
                f"{section}.{key}: '{brief(name)}' is not one of {', '.join(choices)}.{near(name, choices)}"
            )
        kinds[section] = choices[name]
    if isinstance(tree.get("encoder"), dict) and "preset" in tree["encoder"]:
        encoder = tree["encoder"]
        tree["encoder"] = {**preset_values(encoder.pop("preset")), **encoder}
    if base is not None:
        tree["encoder"] = {**asdict(base), **(tree.get("encoder") or {})}
    palette = tree["encoder"].get("palette", UNIFORM) if isinstance(tree.get("encoder"), dict) else UNIFORM
    if isinstance(palette, str) and palette != UNIFORM:
        palette = expand_path(palette)
        beside = path.parent / palette  # a recipe may bring its palette along
        tree["encoder"]["palette"] = read_palette(
            palette if Path(palette).exists() else beside if beside.exists() else palette
        )
    _leave_open(tree, changes)
    return build(RunSettings, tree, kinds)


def _leave_open(tree: dict[str, Any], changes: dict[str, Any]) -> None:
    """Mark what the recipe's author could not know of the data and nobody has given."""
    data, encoder = tree.setdefault("data", {}), tree.get("encoder")
    if not isinstance(data, dict):
        return
    if not {"data", "data.global_batch_size"} & changes.keys():
        data.setdefault("fit_batch", True)
    if isinstance(encoder, dict) and encoder.get("channels", 3) not in (1, 3):
        is_given = any(encoder.get(key) is not None for key in ("mean", "std"))
        data.setdefault("fit_normalization", not is_given)


def read_protocol(name: str, changes: dict[str, Any]) -> ProtocolSettings:
    """The linear probe of a name, with changes such as {"protocol.epochs": 10}.

    Raises:
        ValueError: an unknown key, or a value that does not fit.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"--protocol {brief(name)}: not one of {', '.join(PROTOCOLS)}.")
    tree = {}
    for key, value in changes.items():
        if not key.startswith("protocol."):
            raise ValueError(f"--{brief(key)}: no such option. Settings of the linear probe are --protocol.KEY.")
        tree[key.removeprefix("protocol.")] = value
    if "name" in tree:
        raise ValueError("--protocol.name: say --protocol NAME.")
    try:
        return build(PROTOCOLS[name], tree)
    except ValueError as error:
        raise ValueError(f"--protocol {name}: {error}") from error


def _chosen(tree: Any, section: str, key: str, default: str) -> Any:
    """Which of several records a section of the recipe is."""
    for part in section.split("."):
        tree = (tree.get(part) or {}) if isinstance(tree, dict) else {}
    return tree.get(key, default) if isinstance(tree, dict) else tree


def build(kind: type[Settings], tree: dict[str, Any], kinds: dict[str, type] | None = None) -> Settings:
    """A settings dataclass from nested dicts, checked key by key.

    Args:
        kind: the dataclass.
        tree: as YAML gives it.
        kinds: dataclasses to use for some fields instead of those in the annotations.
    """
    check_keys(kind, tree, kinds or {})
    return _instantiate(kind, tree, kinds or {}, "")


def by_dotted_key(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"steps": 5}} -> {"train.steps": 5}."""
    flat = {}
    for key, value in tree.items():
        flat |= by_dotted_key(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def find_recipe(name: str | Path) -> Path:
    """The file behind a path or a recipe name.

    Raises:
        FileNotFoundError: neither a file nor a recipe; the message names the nearest, or says how to list them.
        ValueError: it is a folder.
    """
    path, folder = Path(expand_path(name)), recipes_folder()
    for candidate in (path, folder / path, folder / f"{name}.yaml"):
        if _is_file(candidate):
            return candidate
    known = recipe_names()
    found = difflib.get_close_matches(str(name)[:MAX_KEY], known, n=3, cutoff=0.4)
    hint = f"Did you mean {', '.join(found)}? All recipes: sslvit settings --recipes"
    if path.suffix in (".yaml", ".yml") or not found:
        hint = "Check the path, or take a recipe that comes with sslvit (sslvit settings --recipes)."
    if path.is_dir():
        raise ValueError(f"--config {printable(name)}: a folder. Give a YAML file in it, or a recipe's name.")
    raise FileNotFoundError(f"--config {printable(name)}: no such file or recipe. {hint}")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long for one
        return False


def recipe_names(group: str = "") -> list[str]:
    """What comes with sslvit: recipes by name; of a bench only if that group is asked for."""
    folder = recipes_folder()
    names = [str(file.relative_to(folder).with_suffix("")) for file in sorted(folder.rglob("*.yaml"))]
    return [name for name in names if name.startswith(f"{group}/") or not (group or name.startswith("bench/"))]


def recipes_folder() -> Path:
    """configs/ of a checkout, or the copy that is installed with the package."""
    package = Path(__file__).parents[1]
    checkout = package.parent / "configs"
    return checkout if checkout.is_dir() else package / "configs"


def known_keys(kind: type, kinds: dict[str, type] | None = None, prefix: str = "") -> list[str]:
    """All dotted keys of a settings dataclass."""
    keys = []
    for name, hint in typing.get_type_hints(kind).items():
        nested = (kinds or {}).get(prefix + name, hint)
        keys += known_keys(nested, kinds, f"{prefix}{name}.") if is_dataclass(nested) else [prefix + name]
    return keys


def check_keys(
    kind: type, tree: dict[str, Any], kinds: dict[str, type], prefix: str = "", root: type | None = None
) -> None:
    """Raise ValueError on the first key that the dataclass does not know, with the nearest one that it does."""
    root = root or kind
    hints = typing.get_type_hints(kind)
    for key, value in tree.items():
        if key not in hints:
            name = f"{prefix}{key}"
            raise ValueError(f"{brief(name)}: no such setting.{hint_for(name, known_keys(root, kinds))}")
        nested = kinds.get(prefix + key, hints[key])
        if is_dataclass(nested):
            if value is None:
                raise ValueError(EMPTY.format(prefix + key))
            if not isinstance(value, dict):
                raise ValueError(f"{prefix}{key}: expected settings below it, not {quoted(value)}.")
            check_keys(nested, value, kinds, f"{prefix}{key}.", root)


def hint_for(key: str, every: list[str]) -> str:
    """What an unknown key was meant to be, as a sentence that goes on; empty where nothing is near.

    Args:
        key: with dots.
        every: the keys that there are.
    """
    key = key[:MAX_KEY].replace("-", "_")
    section, _, last = key.rpartition(".")
    usual = USUAL_NAMES.get(last, ())
    same = [one for one in every if one == key] or [one for one in every if one.split(".")[-1] == last]
    if not same:
        same = [one for name in usual for one in every if one.split(".")[-1] == name]
    if not same and "preset" in usual and "encoder.width" in every:
        same = ["encoder.preset"]
    if same:
        remark = REMARKS.get(same[0].split(".")[-1], "") if usual else ""
        return f" Did you mean {same[0]}{remark}?"
    for place, (chooser, _, records) in CHOICES.items():
        owners = [name for name, record in records.items() if last in typing.get_type_hints(record)]
        if owners and section in ("", place) and f"{place}.{chooser}" in every:
            return f" {place}.{last} is a setting of {place}.{chooser} {' or '.join(owners)}."
    siblings = {one.split(".")[-1]: one for one in every if one.rpartition(".")[0] == section}
    nearest = [siblings[name] for name in difflib.get_close_matches(last, siblings, n=1)]
    nearest = nearest or difflib.get_close_matches(key, every, n=1, cutoff=0.7)
    return f" Did you mean {nearest[0]}?" if nearest else ""


def _instantiate(kind: type, tree: dict[str, Any], kinds: dict[str, type], prefix: str) -> Any:
    """Innermost first, so that each dataclass fills in its own defaults from what was given."""
    hints = typing.get_type_hints(kind)
    nested = {name: kinds.get(prefix + name, hint) for name, hint in hints.items()}
    values = {}
    for name, value in tree.items():
        if is_dataclass(nested[name]):
            continue
        values[name] = _typed(hints[name], value, prefix + name)
    for name in hints:
        if is_dataclass(nested[name]):
            values[name] = _instantiate(nested[name], tree.get(name, {}), kinds, f"{prefix}{name}.")
    missing = {field.name for field in fields(kind)} - hints.keys()
    assert not missing, missing
    return kind(**values)


def _typed(hint: Any, value: Any, key: str) -> Any:
    """The value as the annotation wants it, checked by jsonargparse."""
    from jsonargparse import ArgumentError, ArgumentParser

    if list[list[float]] in typing.get_args(hint) and _is_table(value):
        return [[float(number) for number in row] for row in value]  # jsonargparse takes seconds for a palette
    if type(value) is int and abs(value) > MAX_INT:
        raise ValueError(f"{key}: {brief(value)} is too large a number.")
    if value is None and type(None) not in typing.get_args(hint):  # which jsonargparse takes for nothing given
        raise ValueError(f"{key}: null is not {_describe(hint)}.")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    try:
        return parser.parse_object({"value": value}).value
    except (ArgumentError, RecursionError, OverflowError) as error:
        raise ValueError(f"{key}: {quoted(value)} is not {_describe(hint)}.{_meant(hint, value, key)}") from error


def _meant(hint: Any, value: Any, key: str) -> str:
    """Which of several words was meant."""
    words = _choices(hint)
    for meant, names in USUAL_VALUES.get(key, {}).items():
        if str(value)[:MAX_KEY].lower() in names:
            return f" Did you mean {meant}?"
    return near(value, words)


def _choices(hint: Any) -> list[str]:
    """The words that an annotation allows; none where it allows others."""
    return list(typing.get_args(hint)) if typing.get_origin(hint) is typing.Literal else []


def _is_table(value: Any) -> bool:
    """Whether it is a list of lists of numbers."""
    rows = value if isinstance(value, list) else [None]
    return all(isinstance(row, list) and all(type(number) in (int, float) for number in row) for row in rows)


def _describe(hint: Any) -> str:
    """An annotation in plain words."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    if hint in names:
        return names[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_describe(argument) for argument in arguments)
    if origin is list:
        inner = _describe(arguments[0]).removeprefix("a ")
        return f"a list of {inner.replace('list', 'lists', 1) if inner.startswith('list') else inner + 's'}"
    return str(hint)


def read_yaml(path: Path) -> dict[str, Any]:
    """Keys and values of a YAML file; nothing in it can run.

    Raises:
        ValueError: it is not YAML, holds something else than keys and values, or far too much.
    """
    if path.stat().st_size > MAX_YAML_BYTES:
        raise ValueError(f"{printable(path)}: {path.stat().st_size:,} bytes are too many for settings.")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except YAML_ERRORS as error:
        reason = printable(" ".join(str(error).split()), 160)
        raise ValueError(f"{printable(path)}: not readable as YAML ({reason}).") from error
    if _count(tree) > MAX_YAML_VALUES:
        raise ValueError(f"{printable(path)}: holds more values than settings ever have.")
    if not isinstance(tree, dict):
        raise ValueError(f"{printable(path)}: expected keys and values, found {type(tree).__name__}.")
    return tree


def _count(tree: Any) -> int:
    """How many values there are, counted no further than the limit: aliases may repeat them without end."""
    found, left = 0, [tree]
    while left and found <= MAX_YAML_VALUES:
        value = left.pop()
        found += 1
        if isinstance(value, dict):
            left += value.values()
        elif isinstance(value, (list, tuple, set)):
            left += value
    return found


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for depth, part in enumerate(path, start=1):
        tree = tree.setdefault(part, {})
        if tree is None:
            raise ValueError(EMPTY.format(brief(".".join(path[:depth]))))
        if not isinstance(tree, dict):
            raise ValueError(f"{brief(key)}: '{brief(part)}' holds a value, not settings.")
    tree[last] = value


def _drop(tree: Any, key: str) -> None:
    """Take a dotted key out of a recipe, if it is there."""
    *path, last = key.split(".")
    for part in path:
        tree = tree.get(part) if isinstance(tree, dict) else None
    if isinstance(tree, dict):
        tree.pop(last, None)


def describe_settings(kind: type = RunSettings, prefix: str = "", width: int = 100) -> str:
    """Each key with its default, its meaning and its choices, read from the dataclasses and their docstrings.

    Args:
        kind: a dataclass of settings.
        prefix: of its keys.
        width: of a line.
    """
    meanings = _argument_texts(kind)
    lines = []
    for field in fields(kind):
        hint = typing.get_type_hints(kind)[field.name]
        section = prefix + field.name
        records = list(CHOICES[section][2].values()) if section in CHOICES else [hint] if is_dataclass(hint) else []
        for record in records:
            lines += ["", describe_settings(record, f"{section}.", width)]
        if records:
            continue
        default = field.default_factory() if field.default is MISSING else field.default
        shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else default
        meaning, choices = meanings[field.name], _choices(hint)
        if CHOICES.get(prefix.rstrip("."), ("",))[0] == field.name:
            meaning = f"one of {', '.join(CHOICES[prefix.rstrip('.')][2])}; the keys below are those of {shown}."
        elif not all(re.search(rf"\b{re.escape(word)}\b", meaning) for word in choices):
            meaning += f" One of {', '.join(choices)}."
        lines += textwrap.wrap(
            f"{section} ({shown}): {meaning}", width, subsequent_indent="    ", break_long_words=False,
            break_on_hyphens=False,
        )  # fmt: skip
    return "\n".join(lines).strip("\n") if not prefix else "\n".join(lines)


def _argument_texts(kind: type) -> dict[str, str]:
    """Name -> text of the "Args:" section of a class's docstring."""
    lines = inspect.getdoc(kind).split("Args:\n", 1)[1].splitlines()
    texts: dict[str, str] = {}
    for line in lines:
        if match := re.match(r"    (\w+): (.*)", line):
            name, texts[match[1]] = match[1], match[2]
        elif line.startswith("        "):
            texts[name] += " " + line.strip()
    return texts
