"""YAML and command line -> settings; whatever is wrong is said in one line before anything else happens."""

from __future__ import annotations

import difflib
import inspect
import re
import types
import typing
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from sslvit.settings.encoder import EncoderSettings
from sslvit.settings.palette import UNIFORM, read_palette
from sslvit.settings.presets import preset_values
from sslvit.settings.protocols import PROTOCOLS, ProtocolSettings
from sslvit.settings.run import TASK_SETTINGS, PretrainSettings
from sslvit.settings.views import VIEW_SETTINGS

Settings = TypeVar("Settings")
# sections that are one of several records: the key that picks it, its default, and the records
CHOICES: dict[str, tuple[str, str, dict[str, type]]] = {
    "task": ("name", "mae", TASK_SETTINGS),
    "data.view": ("kind", "crop", VIEW_SETTINGS),
}


def load_recipe(
    config: str | Path, changes: dict[str, Any] | None = None, base: EncoderSettings | None = None
) -> PretrainSettings:
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
    tree = _read_yaml(path)
    if isinstance(tree.get("data"), dict) and tree["data"].get("allow_pipe"):
        raise ValueError(f"{path}: data.allow_pipe is for you to give, not for a file: --data.allow_pipe true")
    changes = changes or {}
    for section, (key, default, _) in CHOICES.items():
        if f"{section}.{key}" in changes and changes[f"{section}.{key}"] != _chosen(tree, section, key, default):
            _put(tree, section, {})  # the recipe's other keys there belong to its own choice
    for key, value in changes.items():
        _put(tree, key, value)
    kinds = {}
    for section, (key, default, choices) in CHOICES.items():
        name = _chosen(tree, section, key, default)
        if not isinstance(name, str) or name not in choices:
            raise ValueError(f"{section}.{key}: '{name}' is not one of {', '.join(choices)}.")
        kinds[section] = choices[name]
    if isinstance(tree.get("encoder"), dict) and "preset" in tree["encoder"]:
        encoder = tree["encoder"]
        tree["encoder"] = {**preset_values(encoder.pop("preset")), **encoder}
    if base is not None:
        tree["encoder"] = {**asdict(base), **(tree.get("encoder") or {})}
    palette = tree["encoder"].get("palette", UNIFORM) if isinstance(tree.get("encoder"), dict) else UNIFORM
    if isinstance(palette, str) and palette != UNIFORM:
        beside = path.parent / palette  # a recipe may bring its palette along
        tree["encoder"]["palette"] = read_palette(
            palette if Path(palette).exists() else beside if beside.exists() else palette
        )
    return build(PretrainSettings, tree, kinds)


def read_protocol(name: str, changes: dict[str, Any]) -> ProtocolSettings:
    """The linear probe of a name, with changes such as {"protocol.epochs": 10}.

    Raises:
        ValueError: an unknown key, or a value that does not fit.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"--protocol {name}: not one of {', '.join(PROTOCOLS)}.")
    tree = {}
    for key, value in changes.items():
        if not key.startswith("protocol."):
            raise ValueError(f"--{key}: no such option. Settings of the linear probe are --protocol.KEY.")
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


def brief(value: Any) -> str:
    """A value in a message: a palette of 512 colours would fill the screen."""
    text = str(value)
    return text if len(text) <= 60 else f"{text[:40]} ..."


def find_recipe(name: str | Path) -> Path:
    """The file behind a path or a recipe name."""
    path = Path(name)
    if path.is_file():
        return path
    folder = recipes_folder()
    for candidate in (folder / path, folder / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    known = [str(file.relative_to(folder).with_suffix("")) for file in sorted(folder.rglob("*.yaml"))]
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.4) or known
    raise FileNotFoundError(f"--config {name}: no such file or recipe. Did you mean {', '.join(near)}?")


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
            every = known_keys(root, kinds)
            near = difflib.get_close_matches(f"{prefix}{key}", every, n=1, cutoff=0.5)
            tail = [k for k in every if k.split(".")[-1] == key]
            hint = f" Did you mean {(tail or near)[0]}?" if tail or near else ""
            raise ValueError(f"{prefix}{key}: no such setting.{hint}")
        nested = kinds.get(prefix + key, hints[key])
        if is_dataclass(nested):
            if not isinstance(value, dict):
                raise ValueError(f"{prefix}{key}: expected settings below it, not {value!r}.")
            check_keys(nested, value, kinds, f"{prefix}{key}.", root)


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
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    try:
        return parser.parse_object({"value": value}).value
    except ArgumentError as error:
        raise ValueError(f"{key}: {value!r} is not {_describe(hint)}.") from error


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


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as YAML ({' '.join(str(error).split())[:160]}).") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: expected keys and values, found {type(tree).__name__}.")
    return tree


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ValueError(f"{key}: '{part}' holds a value, not settings.")
    tree[last] = value


def describe_settings(kind: type = PretrainSettings, prefix: str = "") -> str:
    """One line per key: name, default and meaning, read from the dataclasses and their docstrings."""
    meanings = _argument_texts(kind)
    lines = []
    for field in fields(kind):
        hint = typing.get_type_hints(kind)[field.name]
        section = prefix + field.name
        records = list(CHOICES[section][2].values()) if section in CHOICES else [hint] if is_dataclass(hint) else []
        for record in records:
            lines += ["", describe_settings(record, f"{section}.")]
        if records:
            continue
        default = field.default_factory() if field.default is MISSING else field.default
        shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else default
        lines.append(f"{section} ({shown}): {meanings[field.name]}")
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
