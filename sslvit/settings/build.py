"""Build settings dataclasses from nested dicts; every error is one line that names the key."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, NamedTuple, TypeVar

from sslvit.files import brief, quoted
from sslvit.plugins import PluginNeeded
from sslvit.settings.choices import Choice, alternatives, hints_of, in_message, not_one_of, plain, words_of
from sslvit.settings.encoder import EncoderSettings

Settings = TypeVar("Settings")
EMPTY = "{}: an empty section. Put settings below it, or leave it out."
MAX_KEY = 100  # characters of a key or value to compare with known ones
MAX_INT = 2**63 - 1
NUMBER = re.compile(r"[+-]?\d+(\.\d*)?e[+-]?\d+", re.IGNORECASE)  # such as 1e-3, which YAML reads as text
# key -> its names in other libraries
USUAL_NAMES: dict[str, tuple[str, ...]] = {
    "base_lr": ("lr", "learning_rate", "base_rate", "blr", "max_lr", "rate", "peak_lr"),
    "optim.name": ("optimizer", "opt"),
    "lrs": ("lr", "learning_rate", "base_rate"), "weight_decay": ("wd",), "warmup_epochs": ("warmup", "warmup_steps"),
    "clip_grad": ("clip", "grad_clip", "max_norm", "gradient_clip_val", "max_grad_norm"),
    "global_batch_size": ("batch_size", "batch", "bs"), "batch": ("batch_size", "bs"), "workers": ("num_workers",),
    "teacher_temp": ("teacher_temperature",), "student_temp": ("student_temperature",),
    "warmup_teacher_temp": ("warmup_teacher_temperature",), "momentum": ("momentum_teacher",),
    "shards": ("data_path", "data_dir"), "out": ("output_dir", "save_dir"), "epochs": ("max_epochs", "num_epochs"),
    "steps": ("max_steps", "num_steps"), "devices": ("gpus", "num_gpus"), "nodes": ("num_nodes",),
    "precision": ("amp",), "image_size": ("img_size", "input_size"), "patch": ("patch_size",),
    "width": ("embed_dim", "hidden_size"), "heads": ("num_heads",), "depth": ("num_layers", "layers"),
    "drop_path": ("drop_path_rate",), "channels": ("in_chans",), "preset": ("arch", "model"),
    "activation_checkpointing": ("grad_checkpointing", "gradient_checkpointing"), "betas": ("beta1", "beta2"),
    "accelerator": ("device",),
    "micro_batch_size": ("micro_batch", "accumulate_grad_batches", "gradient_accumulation_steps", "accum_iter"),
    "target": ("norm_pix_loss",), "local_crops": ("local_crops_number",), "global_scale": ("global_crops_scale",),
    "local_scale": ("local_crops_scale",), "scale": ("crop_scale",),
    "pos_embed": ("positions", "position_embedding", "pos_emb"), "init": ("initialization", "initialisation"),
    "hybrid_backbone": ("cnn",), "locality_self_attention": ("locality", "lsa"),
}  # fmt: skip
REMARKS = {
    "base_lr": " (the learning rate at a batch size of 256)",
    "micro_batch_size": " (images per forward pass; as many passes as make data.global_batch_size are accumulated)",
}
# value -> its names in other libraries
PRECISIONS: dict[str, tuple[str, ...]] = {
    "float32": ("32", "fp32", "f32", "32-true", "single", "full"),
    "bf16": ("bf16-mixed", "bf16-true", "bfloat16", "16", "fp16", "float16", "16-mixed", "half", "mixed"),
}
USUAL_VALUES: dict[str, dict[str, tuple[str, ...]]] = {
    "train.precision": PRECISIONS | {"float64": ("64", "fp64", "f64", "64-true", "double")},
    "online.precision": PRECISIONS,
    "precision": PRECISIONS,
    "train.accelerator": {"gpu": ("cuda", "cuda:0")},
    "train.compile": {"default": ("true", "yes", "on"), "none": ("false", "no", "off", "eager")},
}


class Known(NamedTuple):
    """The known keys and choices, to find what an unknown key means."""

    keys: list[str]
    choices: dict[str, Choice]


def build(kind: type[Settings], tree: dict[str, Any]) -> Settings:
    """Build a settings dataclass from nested dicts.

    Args:
        kind: The dataclass.
        tree: Keys and values as in YAML. A section that may be one of several dataclasses names it by a key
            (`task: {name: dino}`), or consists of the name alone (`protocol: mae`).

    Raises:
        ValueError: A key is unknown (the nearest is suggested) or missing, or a value is invalid.
    """
    check_keys(kind, tree)
    built: Settings = _instantiate(kind, tree, "")
    return built


def check_keys(kind: type, tree: dict[str, Any]) -> None:
    """Raise ValueError for an unknown key or a section without settings, as `build` does."""
    _check_keys(kind, tree, "", Known(list(known_keys(kind, tree)), choices_in(kind)))


def choice_of(hint: Any) -> Choice | None:
    """The choice of dataclasses for a section; None for a section with a fixed dataclass and for a plain value."""
    return next((one for one in getattr(hint, "__metadata__", ()) if isinstance(one, Choice)), None)


def record_of(hint: Any, value: Any, section: str) -> Any:
    """The dataclass for the value of a section; None if the annotation is not a section."""
    if choice := choice_of(hint):
        value = {} if value is None else value
        return choice.record(value.get(choice.key, choice.default) if isinstance(value, dict) else value, section)
    return next((one for one in alternatives(hint) if is_dataclass(one)), None)


def section_of(kind: type, key: str) -> Any:
    """The annotation of the section with a dotted key; None if it is a plain value or unknown."""
    hint: Any = kind
    for name in key.split("."):
        known = hints_of(hint) if hasattr(hint, "__dataclass_fields__") else {}
        hint = known.get(name)
        if choice_of(hint) is None:
            hint = next((one for one in alternatives(hint) if is_dataclass(one)), None)
    return hint


def known_keys(kind: type, tree: Any = None, prefix: str = "") -> Iterator[str]:
    """All dotted keys of a settings dataclass, including those of the dataclasses chosen in `tree`."""
    tree = tree if isinstance(tree, dict) else {}
    if kind is EncoderSettings and prefix:
        yield f"{prefix}preset"
    for name, hint in hints_of(kind).items():
        nested = record_of(hint, tree.get(name), prefix + name)
        if nested is None:
            yield prefix + name
        else:
            yield from known_keys(nested, tree.get(name), f"{prefix}{name}.")


def _named_sections(hint: Any) -> Any:
    """The annotation of the values in a dict of sections, such as the columns of a bench; otherwise None."""
    values = plain(hint).__args__[1] if typing.get_origin(plain(hint)) is dict else None
    return values if choice_of(values) or is_dataclass(values) else None


def _check_keys(kind: type, tree: dict[str, Any], prefix: str, known: Known) -> None:
    hints = hints_of(kind)
    for key, value in tree.items():
        section = f"{prefix}{key}"
        if key not in hints:
            raise ValueError(f"{brief(section)}: no such setting.{hint_for(section, known)}")
        if named := _named_sections(hints[key]):
            for name, entry in value.items() if isinstance(value, dict) else ():
                _check_section(named, entry, f"{section}.{brief(name)}", None)
        else:
            _check_section(hints[key], value, section, known)


def _check_section(hint: Any, value: Any, section: str, known: Known | None) -> None:
    if value is None and type(None) in alternatives(hint):
        return
    choice, record = choice_of(hint), record_of(hint, value, section)
    if record is None or (choice and isinstance(value, str)):
        return
    if value is None:
        raise ValueError(EMPTY.format(section))
    if not isinstance(value, dict):
        raise ValueError(f"{section}: expected settings below it, not {quoted(value)}.")
    prefix = f"{section}."
    _check_keys(record, value, prefix, known or Known(list(known_keys(record, value, prefix)), {}))


def hint_for(key: str, known: Known) -> str:
    """Hint on the meaning of an unknown dotted key, to append to a message; empty if no key is similar."""
    every = known.keys
    key = key[:MAX_KEY].replace("-", "_")
    section, _, last = key.rpartition(".")
    usual = [ours for ours, names in USUAL_NAMES.items() if last in names]
    same = [one for one in every if one == key] or [one for one in every if one.split(".")[-1] == last]
    if not same:
        same = [one for name in usual for one in every if f".{one}".endswith(f".{name}")]
    if same:
        remark = REMARKS.get(same[0].split(".")[-1], "") if usual else ""
        return f" Did you mean {same[0]}{remark}?"
    for path, choice in known.choices.items():
        for meant in (last, *usual) if section in ("", path) else ():
            if owners := [name for name, record in choice.records.items() if meant in hints_of(record)]:
                return f" {path}.{meant} is a setting of {path}.{choice.key} {' or '.join(owners)}."
    siblings = {one.split(".")[-1]: one for one in every if one.rpartition(".")[0] == section}
    nearest = [siblings[name] for name in difflib.get_close_matches(last, siblings, n=1)]
    nearest = nearest or difflib.get_close_matches(key, every, n=1, cutoff=0.7)
    return f" Did you mean {nearest[0]}?" if nearest else ""


def choices_in(kind: type, prefix: str = "") -> dict[str, Choice]:
    """Dotted key of each section with a choice of dataclasses -> the choice."""
    found: dict[str, Choice] = {}
    for name, hint in hints_of(kind).items():
        if choice := choice_of(hint):
            found[prefix + name] = choice
        elif nested := record_of(hint, {}, ""):
            found |= choices_in(nested, f"{prefix}{name}.")
    return found


def _instantiate(kind: Any, tree: dict[str, Any], prefix: str, within: str = "") -> Any:
    """Build the innermost dataclasses first, so that each can derive its defaults from given values.

    `within` is a section to name in errors, for dataclasses whose own messages do not.
    """
    hints, values = hints_of(kind), dict[str, Any]()
    for name, value in tree.items():
        hint, key = hints[name], prefix + name
        if named := _named_sections(hint):
            values[name] = {
                entry: _section(named, one, f"{key}.{brief(entry)}", f"{key}.{brief(entry)}")
                for entry, one in (value.items() if isinstance(value, dict) else ())
            }
        elif record_of(hint, {}, ""):
            values[name] = _section(hint, value, key, within and key)
        else:
            values[name] = convert(hint, value, key)
    for one in fields(kind):
        if is_required(one) and one.name not in values:
            raise ValueError(f"{prefix}{one.name}: missing.")
    try:
        return kind(**values)
    except PluginNeeded:
        raise
    except ValueError as error:
        raise ValueError(f"{within}: {error}" if within else str(error)) from error


def is_required(one: Any) -> bool:
    """Whether a dataclass field has no default."""
    return one.default is MISSING and one.default_factory is MISSING


def _section(hint: Any, value: Any, section: str, within: str) -> Any:
    """Build the dataclass of a section; None for a null section."""
    if value is None and type(None) in alternatives(hint):
        return None
    choice, record = choice_of(hint), record_of(hint, value, section)
    assert record is not None
    tree = {choice.key: value} if choice and isinstance(value, str) else value
    return _instantiate(record, tree, f"{section}.", within)


def convert(hint: Any, value: Any, key: str) -> Any:
    """Convert a value to the type of an annotation.

    Raises:
        ValueError: The value has another type; the message names the key and the expected type.
    """
    if type(value) is int and abs(value) > MAX_INT:
        raise ValueError(f"{key}: {brief(value)} is too large a number.")
    try:
        return _converted(hint, value)
    except (TypeError, OverflowError, RecursionError) as error:
        words = words_of(hint)
        wrong = not_one_of(value, words) if words else f"expected {describe_type(hint)}, got {in_message(value)}."
        for meant, names in USUAL_VALUES.get(key.removeprefix("--"), {}).items():
            if str(value)[:MAX_KEY].lower() in names:
                wrong = f"{in_message(value)} is not one of {', '.join(map(str, words))}. Did you mean {meant}?"
        raise ValueError(f"{key}: {wrong}") from error


def _converted(hint: Any, value: Any) -> Any:
    if callable(to_plain := getattr(value, "tolist", None)):
        value = to_plain()  # a number or an array of NumPy or torch
    options = alternatives(hint)
    if len(options) > 1:
        for option in options:
            try:
                return _converted(option, value)
            except TypeError:
                continue
        raise TypeError
    (hint,) = options
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or (origin is typing.Literal and value in arguments):
        return value
    if origin is list and isinstance(value, (list, tuple)):
        return [_converted(arguments[0], one) for one in value]
    if origin is dict and isinstance(value, dict):
        return {_converted(arguments[0], name): _converted(arguments[1], one) for name, one in value.items()}
    if hint is float and (type(value) is int or (isinstance(value, str) and NUMBER.fullmatch(value))):
        return float(value)
    if type(value) is hint:
        return value
    raise TypeError


def describe_type(hint: Any) -> str:
    """Describe a type annotation for a message."""
    if len(alternatives(hint)) > 1:
        return " or ".join(map(describe_type, alternatives(hint)))
    hint = plain(hint)
    if typing.get_origin(hint) is typing.Literal:
        words = typing.get_args(hint)
        return ("one of " if len(words) > 1 else "") + ", ".join(map(str, words))
    if isinstance(hint, types.GenericAlias):
        return f"{hint.__origin__.__name__}[{', '.join(map(describe_type, hint.__args__))}]"
    return "null" if hint is type(None) else getattr(hint, "__name__", str(hint))
