"""YAML and command line -> settings; whatever is wrong is said in one line before anything else happens.

What is said later wins: the base of a recipe, the recipe, then the changes in their order. A preset sets its keys where
it is said; within a section it comes before the section's other keys, wherever it is written.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Container, Iterator, Mapping
from dataclasses import asdict, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import yaml

from sslvit.files import brief, expand_path, printable
from sslvit.messages import for_python
from sslvit.settings.build import EMPTY, MAX_KEY, build, check_keys, choice_of, convert, section_of
from sslvit.settings.choices import hints_of
from sslvit.settings.encoder import EncoderSettings
from sslvit.settings.palette import UNIFORM, read_palette
from sslvit.settings.presets import INIT, preset_values
from sslvit.settings.run import RunSettings

# a change of a key takes those, which would exclude it or win over it, out of what was said before
REPLACED = {
    "data.shards": ("data.mixture",), "data.mixture": ("data.shards",), "train.epochs": ("train.steps", "train.budget"),
    "train.steps": ("train.budget",), "train.budget": ("train.steps",),
}  # fmt: skip
Settings = TypeVar("Settings")
MADE_BY = "made_by"  # in a run's config.yaml: the processes that ran it, which is no setting
FIRST = ("preset", "name", "kind")  # keys that decide what the others of their section mean or start from
# what reading YAML may raise: its constructors of dates and numbers have errors of their own for damaged ones
YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError, AttributeError, TypeError, KeyError, OverflowError)
MAX_YAML_BYTES = 2**23
MAX_YAML_VALUES = 500_000  # aliases make few bytes stand for any number of values


@for_python
def load_recipe(
    config: str | Path, changes: dict[str, Any] | None = None, base: EncoderSettings | None = None
) -> RunSettings:
    """The settings of a recipe with changes.

    Args:
        config: YAML file, or the name of one in configs/ such as mae/digits; its key `base` names another one, whose
            keys it changes.
        changes: Dotted keys and their values, such as {"train.epochs": 10}, or whole sections, whose keys are merged
            with the recipe's; they win over the recipe, and later ones over earlier ones.
        base: Encoder whose settings the recipe changes, and which `encoder.preset: init` means; None for one that the
            recipe describes itself.

    Raises:
        FileNotFoundError: No such recipe (the nearest names are shown).
        ValueError: An unknown key (the nearest is suggested), or a value that does not fit.
    """
    if base is None and takes_init(config, changes):
        raise ValueError(
            f"encoder.preset: {INIT} means the encoder of --init, and {brief(str(config))} is read without one."
            " Give its settings as base: sslvit.load_recipe(..., base=encoder.settings)."
        )
    return build(RunSettings, merge_recipe(config, changes, base))


def takes_init(config: str | Path, changes: dict[str, Any] | None = None) -> bool:
    """Whether the encoder's architecture is to be read from the weights of --init (`encoder.preset: init`)."""
    preset = None
    for content in (*(content for _, content in _with_bases(find_recipe(config))), changes or {}):
        preset = dict(leaves(RunSettings, content)).get("encoder.preset") or preset
    return preset == INIT


def check_changes(config: str | Path, changes: dict[str, Any]) -> None:
    """Refuse what is wrong with a recipe and its changes whatever the encoder is that they change.

    Reading that encoder takes torch, whose import takes seconds; this takes none of them.

    Raises:
        FileNotFoundError: No such recipe.
        ValueError: An unknown key, or a value that fits no encoder.
    """
    tree = merge_recipe(config, changes, None)
    check_keys(RunSettings, tree)
    for key, value in tree.pop("encoder", {}).items():
        convert(hints_of(EncoderSettings)[key], value, f"encoder.{key}")
    build(RunSettings, tree)


def merge_recipe(
    config: str | Path, changes: dict[str, Any] | None = None, base: EncoderSettings | None = None
) -> dict[str, Any]:
    """The nested keys and values of a recipe with changes, not yet checked; arguments as those of `load_recipe`."""
    path, given = find_recipe(config), dict(leaves(RunSettings, changes or {}))
    if "base" in given:
        raise ValueError("base: stands in a YAML file. The recipe that all other settings change is that of --config.")
    tree: dict[str, Any] = {} if base is None else {"encoder": asdict(base)}
    for file, content in _with_bases(path):
        recipe = dict(leaves(RunSettings, content))
        if recipe.get("data.allow_pipe") and not given.get("data.allow_pipe"):
            raise ValueError(f"{file}: data.allow_pipe is for you to give, not for a file: --data.allow_pipe true")
        for key, value in recipe.items():
            if value is not None:
                _drop_replaced(tree, key, recipe)
            is_palette = key == "encoder.palette" and isinstance(value, str)
            _say(RunSettings, tree, key, _palette_beside(file, value) if is_palette else value, base)
    set_keys(RunSettings, tree, changes or {}, base)
    encoder = tree.get("encoder")
    if isinstance(encoder, dict) and isinstance(encoder.get("palette"), str) and encoder["palette"] != UNIFORM:
        encoder["palette"] = read_palette(_palette_beside(path, encoder["palette"]))
    _leave_open(tree, given)
    return tree


def _with_bases(path: Path, above: tuple[Path, ...] = ()) -> list[tuple[Path, dict[str, Any]]]:
    """A YAML file and its content, after those of its base, of the base's base and so on.

    Raises:
        FileNotFoundError: A base is neither a file nor a recipe.
        ValueError: Bases that lead in a circle, or a base that is no name.
    """
    content, chain = read_yaml(path), (*above, path.resolve())
    content.pop(MADE_BY, None)
    if (base := content.pop("base", None)) is None:
        return [(path, content)]
    if not isinstance(base, str):
        raise ValueError(f"{printable(path)}: base: {brief(base)} is no name of a recipe and no YAML file.")
    beside = path.parent / expand_path(base)
    try:
        below = beside if os.path.isfile(beside) else find_recipe(base, option="base: ")
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"{printable(path)}: {error}") from error
    if below.resolve() in chain:
        raise ValueError(f"{printable(path)}: base: {brief(base)} leads back to where it began. Leave one base out.")
    return [*_with_bases(below, chain), (path, content)]


def _palette_beside(file: Path, palette: str) -> str:
    """The path of a palette, which a recipe may bring along in its folder."""
    path = expand_path(palette)
    return str(file.parent / path) if not Path(path).exists() and (file.parent / path).exists() else path


def leaves(kind: type, tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested settings in the order in which they count.

    Keys of the tree may be dotted, too.
    """
    for name in sorted(tree, key=lambda name: name not in FIRST):
        key, value = f"{prefix}{name}", tree[name]
        section = section_of(kind, key)
        if section is not None and isinstance(value, dict):
            yield from leaves(kind, value, f"{key}.")
        elif isinstance(value, str) and (choice := choice_of(section)):
            yield f"{key}.{choice.key}", value
        else:
            yield key, value


def set_keys(kind: type, tree: dict[str, Any], changes: dict[str, Any], base: EncoderSettings | None = None) -> None:
    """Let changes win over what nested settings say, and later ones over earlier ones."""
    for key, value in leaves(kind, changes):
        if value is not None:
            _drop_replaced(tree, key)
        _say(kind, tree, key, value, base)


def from_keywords(kind: type[Settings], given: Mapping[str, Any]) -> Settings:
    """Settings from the keywords of a Python call, sections as names, dicts or dataclasses.

    Raises:
        ValueError: No such keyword (the nearest is suggested), or a value that does not fit.
    """
    tree: dict[str, Any] = {}
    plain = {key: asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
             for key, value in given.items()}  # fmt: skip
    set_keys(kind, tree, plain)
    return build(kind, tree)


def _drop_replaced(tree: dict[str, Any], key: str, kept: Container[str] = ()) -> None:
    """Take out what a change of a key replaces, but for keys that are said together with it."""
    for replaced in REPLACED.get(key, ()):
        if replaced not in kept:
            section, _, name = replaced.rpartition(".")
            _find(tree, section).pop(name, None)


def _say(kind: type, tree: dict[str, Any], key: str, value: Any, base: EncoderSettings | None = None) -> None:
    if key == "encoder.preset" and value == INIT:
        _put(tree, "encoder", {} if base is None else asdict(base))  # nothing of what was said before
        return
    if key == "encoder.preset":
        for name, preset in preset_values(value).items():
            _put(tree, f"encoder.{name}", preset)
        return
    section, _, last = key.rpartition(".")
    choice = choice_of(section_of(kind, section)) if section else None
    if choice and last == choice.key and value != _find(tree, section).get(last, choice.default):
        _put(tree, section, {})  # the other keys there belong to another choice
    _put(tree, key, value)


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for depth, name in enumerate(path, start=1):
        tree = tree.setdefault(name, {})
        if tree is None:
            raise ValueError(EMPTY.format(brief(".".join(path[:depth]))))
        if not isinstance(tree, dict):
            raise ValueError(f"{brief(key)}: '{brief(name)}' holds a value, not settings.")
    tree[last] = value


def _find(tree: Any, section: str) -> dict[str, Any]:
    """A section of nested settings."""
    for name in section.split("."):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) else {}


def _leave_open(tree: dict[str, Any], given: dict[str, Any]) -> None:
    """Mark what the recipe's author could not know of the data and nobody has given."""
    data, encoder = tree.setdefault("data", {}), tree.get("encoder")
    if not isinstance(data, dict):
        return
    if "data.global_batch_size" not in given:
        data.setdefault("fit_batch", True)
    if isinstance(encoder, dict) and encoder.get("channels", 3) not in (1, 3):
        is_given = any(encoder.get(key) is not None for key in ("mean", "std"))
        data.setdefault("fit_normalization", not is_given)


def by_dotted_key(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"steps": 5}} -> {"train.steps": 5}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= by_dotted_key(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def find_recipe(name: str | Path, group: str = "", option: str = "--config ") -> Path:
    """The file behind a path or a recipe's name.

    Args:
        name: The path or name.
        group: Folder of configs/ that alone is searched, whose recipes may be named without it; by default all but
            those of benches.
        option: What named it, for messages.

    Raises:
        FileNotFoundError: Neither a file nor a recipe; the message names the nearest, or says how to list them.
        ValueError: It is a folder, or a bench.
    """
    path, known = Path(expand_path(name)), recipe_names(group)
    if os.path.isfile(path):  # which is no error for a name that is too long for a file, as Path.is_file() is
        return path
    stem = str(name).removesuffix(".yaml")
    if packaged := {stem, f"{group}/{stem}"} & set(known):
        return recipes_folder() / f"{packaged.pop()}.yaml"
    if not group and stem in recipe_names("bench"):
        raise ValueError(f"{option}{printable(name)}: a bench, and no recipe. Run it: sslvit bench {Path(stem).name}")
    near = difflib.get_close_matches(f"{group}/{stem}"[:MAX_KEY] if group else stem[:MAX_KEY], known, n=3, cutoff=0.4)
    hint = f"Did you mean {', '.join(near)}? All that come with sslvit: sslvit recipes"
    if path.suffix in (".yaml", ".yml") or not near:
        hint = "Check the path, or take one that comes with sslvit: sslvit recipes"
    if path.is_dir():
        raise ValueError(
            f"{option}{printable(name)}: a folder, not a YAML file. Give a file in it, or one that comes with sslvit: "
            "sslvit recipes"
        )
    raise FileNotFoundError(f"{option}{printable(name)}: no such file or {group or 'recipe'}. {hint}")


def recipe_names(group: str = "") -> list[str]:
    """What comes with sslvit: recipes by name; of a bench only if that group is asked for."""
    folder = recipes_folder()
    names = [str(file.relative_to(folder).with_suffix("")) for file in sorted(folder.rglob("*.yaml"))]
    return [name for name in names if name.startswith(f"{group}/") or not (group or name.startswith("bench/"))]


def recipes_folder() -> Path:
    """The recipes that are installed with the package; in a checkout, those that lie beside it."""
    package = Path(str(files("sslvit")))
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def read_yaml(path: Path) -> dict[str, Any]:
    """Keys and values of a YAML file; nothing in it can run.

    Raises:
        ValueError: It is not YAML, holds something else than keys and values, or far too much.
    """
    if path.stat().st_size > MAX_YAML_BYTES:
        raise ValueError(f"{printable(path)}: {path.stat().st_size:,} bytes are too many for settings.")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except YAML_ERRORS as error:
        reason = printable(" ".join(str(error).split()), 160)
        raise ValueError(f"{printable(path)}: not readable as YAML ({reason}).") from error
    if tree is None:
        raise ValueError(f"{printable(path)}: says nothing. Put settings into it: sslvit settings lists them.")
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
