"""Load settings from YAML and the command line; every error is one line, raised before anything else happens.

Later values win: first the base of a recipe, then the recipe, then the changes in order. A preset sets its keys at the
place where it is given; within a section, it is applied before the section's other keys.
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

# setting a key removes earlier values of these keys, which conflict with it or override it
REPLACED = {
    "data.shards": ("data.mixture",), "data.mixture": ("data.shards",), "train.epochs": ("train.steps", "train.budget"),
    "train.steps": ("train.budget",), "train.budget": ("train.steps",),
}  # fmt: skip
Settings = TypeVar("Settings")
MADE_BY = "made_by"  # key in a run's config.yaml that records its processes and is not a setting
FIRST = ("preset", "name", "kind")  # keys to apply first, since they determine the others in their section
# exceptions of the YAML parser, whose constructors of dates and numbers raise various errors
YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError, AttributeError, TypeError, KeyError, OverflowError)
MAX_YAML_BYTES = 2**23
MAX_YAML_VALUES = 500_000  # aliases can expand a few bytes to any number of values


class Loader(yaml.SafeLoader):
    """Loader of YAML that refuses a key that stands twice in a section, where the later one would replace the other."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose a section, and compare its keys.

        Raises:
            ValueError: A key stands there twice.
        """
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                line = key.start_mark.line + 1
                raise ValueError(f"{brief(key.value)} stands there twice, again in line {line}: put both together")
            seen.add((key.tag, key.value))
        return node


@for_python
def load_recipe(
    config: str | Path, changes: dict[str, Any] | None = None, base: EncoderSettings | None = None
) -> RunSettings:
    """Load the settings of a recipe, with changes.

    Args:
        config: YAML file, or the name of one in configs/ such as mae/digits. Its key `base` names another recipe, whose
            settings it changes.
        changes: Dotted keys and their values, such as {"train.epochs": 10}, or whole sections, which are merged into
            the recipe. They override the recipe, and later ones override earlier ones.
        base: Settings of the encoder that the recipe changes and that `encoder.preset: init` refers to; None if the
            recipe describes the encoder itself.

    Raises:
        FileNotFoundError: The recipe does not exist (the nearest names are shown).
        ValueError: A key is unknown (the nearest is suggested), or a value is invalid.
    """
    if base is None and takes_init(config, changes):
        raise ValueError(
            f"encoder.preset: {INIT} means the encoder of --init, and {brief(str(config))} is read without one."
            " Give its settings as base: sslvit.load_recipe(..., base=encoder.settings)."
        )
    return build(RunSettings, merge_recipe(config, changes, base))


def takes_init(config: str | Path, changes: dict[str, Any] | None = None) -> bool:
    """Whether the encoder's architecture comes from the weights of --init (`encoder.preset: init`)."""
    preset = None
    for content in (*(content for _, content in _with_bases(find_recipe(config))), changes or {}):
        preset = dict(leaves(RunSettings, content)).get("encoder.preset") or preset
    return preset == INIT


def check_changes(config: str | Path, changes: dict[str, Any]) -> None:
    """Check a recipe and its changes as far as possible without the encoder that they start from.

    Reading that encoder requires torch, whose import takes seconds.

    Raises:
        FileNotFoundError: The recipe does not exist.
        ValueError: A key is unknown, or a value is invalid for any encoder.
    """
    tree = merge_recipe(config, changes, None)
    check_keys(RunSettings, tree)
    for key, value in tree.pop("encoder", {}).items():
        convert(hints_of(EncoderSettings)[key], value, f"encoder.{key}")
    build(RunSettings, tree)


def merge_recipe(
    config: str | Path, changes: dict[str, Any] | None = None, base: EncoderSettings | None = None
) -> dict[str, Any]:
    """Nested keys and values of a recipe with changes, not yet checked; same arguments as `load_recipe`."""
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
    """A YAML file and its content, preceded by its chain of bases, the outermost first.

    Raises:
        FileNotFoundError: A base is neither a file nor a recipe.
        ValueError: The bases form a cycle, or a base is not a name.
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
    """The path of a palette, which may lie in the folder of the recipe."""
    path = expand_path(palette)
    return str(file.parent / path) if not Path(path).exists() and (file.parent / path).exists() else path


def leaves(kind: type, tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values of nested settings in the order in which they are applied.

    Keys of the tree may also be dotted.
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
    """Apply changes to nested settings in order, so that later ones override earlier ones."""
    for key, value in leaves(kind, changes):
        if value is not None:
            _drop_replaced(tree, key)
        _say(kind, tree, key, value, base)


def from_keywords(kind: type[Settings], given: Mapping[str, Any]) -> Settings:
    """Build settings from keyword arguments; sections may be names, dicts or dataclasses.

    Raises:
        ValueError: A keyword is unknown (the nearest is suggested), or a value is invalid.
    """
    tree: dict[str, Any] = {}
    plain = {key: asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
             for key, value in given.items()}  # fmt: skip
    set_keys(kind, tree, plain)
    return build(kind, tree)


def _drop_replaced(tree: dict[str, Any], key: str, kept: Container[str] = ()) -> None:
    """Remove the keys that a new key replaces, except for those in `kept`, which are given together with it."""
    for replaced in REPLACED.get(key, ()):
        if replaced not in kept:
            section, _, name = replaced.rpartition(".")
            _find(tree, section).pop(name, None)


def _say(kind: type, tree: dict[str, Any], key: str, value: Any, base: EncoderSettings | None = None) -> None:
    if key == "encoder.preset" and value == INIT:
        _put(tree, "encoder", {} if base is None else asdict(base))  # discards all earlier settings of the encoder
        return
    if key == "encoder.preset":
        for name, preset in preset_values(value).items():
            _put(tree, f"encoder.{name}", preset)
        return
    section, _, last = key.rpartition(".")
    choice = choice_of(section_of(kind, section)) if section else None
    if choice and last == choice.key and value != _find(tree, section).get(last, choice.default):
        _put(tree, section, {})  # the section's other keys belong to another choice
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
    """A section of nested settings; an empty dict if there is none."""
    for name in section.split("."):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) else {}


def _leave_open(tree: dict[str, Any], given: dict[str, Any]) -> None:
    """Let batch size and normalization adapt to the data unless they are given."""
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
    """Find the file for a path or the name of a recipe.

    Args:
        name: The path or name.
        group: The only folder of configs/ to search, whose recipes may be named without it; by default, all except
            benches.
        option: Option that gave the name, for messages.

    Raises:
        FileNotFoundError: There is no such file or recipe; the message suggests names, or how to list them.
        ValueError: The name is that of a folder or a bench.
    """
    path, known = Path(expand_path(name)), recipe_names(group)
    if os.path.isfile(path):  # unlike Path.is_file(), does not raise for names that are too long
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
    """Names of the recipes that come with sslvit; benches only for the group bench."""
    folder = recipes_folder()
    names = [str(file.relative_to(folder).with_suffix("")) for file in sorted(folder.rglob("*.yaml"))]
    return [name for name in names if name.startswith(f"{group}/") or not (group or name.startswith("bench/"))]


def recipes_folder() -> Path:
    """Folder of the recipes installed with the package; in a checkout, the folder beside it."""
    package = Path(str(files("sslvit")))
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def read_yaml(path: Path) -> dict[str, Any]:
    """Read keys and values from a YAML file; never runs code from the file.

    Raises:
        ValueError: The file is not valid YAML, does not hold keys and values, or is too large.
    """
    if path.stat().st_size > MAX_YAML_BYTES:
        raise ValueError(f"{printable(path)}: {path.stat().st_size:,} bytes are too many for settings.")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader)
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
    """Number of values, counted only up to the limit, since aliases may repeat them without end."""
    found, left = 0, [tree]
    while left and found <= MAX_YAML_VALUES:
        value = left.pop()
        found += 1
        if isinstance(value, dict):
            left += value.values()
        elif isinstance(value, (list, tuple, set)):
            left += value
    return found
