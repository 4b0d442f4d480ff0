"""The one door between training and everything after it: an encoder as a folder, and any file as an encoder.

    encoder.json          settings, preprocessing and where the weights come from
    encoder.safetensors   the weights

Nothing here unpickles code (weight_files.py).
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from sslvit.files import brief, new_file, printable, remove_stale_parts
from sslvit.layouts import Converted, timm, to_sslvit, transformers
from sslvit.layouts.unwrap import unwrap
from sslvit.layouts.vit import count_blocks
from sslvit.models import ViTEncoder
from sslvit.settings import EncoderSettings
from sslvit.settings.build import build
from sslvit.settings.load import YAML_ERRORS
from sslvit.weight_files import FOLDER_FILES, read_folder_weights, read_torch_file

logger = logging.getLogger(__name__)

FORMAT = 1
HEAD = "head.safetensors"  # beside an encoder: the classifier that was trained with it
TIMM = "timm:"  # before the name of one of timm's pretrained models
SNAPSHOTS = "snapshots"  # of a model in the hub's cache
STUDENT, TEACHER = "model.encoder.", "model.teacher."  # of a checkpoint's names, where a task trains both
POSITION_TABLES = ("learned_1d", "sincos_1d", "sincos_2d")
NOT_IN_THE_WEIGHTS = (
    "dropout", "drop_path", "activation_checkpointing", "init", "color_init", "mean", "std", "interpolation",
    "crop_mode", "crop_fraction", "feature_layer", "feature_norm", "pooling",
    "interpolate_antialias", "interpolate_offset",
)  # fmt: skip


def describe_encoder(encoder: ViTEncoder) -> dict[str, Any]:
    """The encoder's settings as plain dicts, lists, strings and numbers."""
    return asdict(encoder.settings)


def fingerprint(encoder: ViTEncoder) -> str:
    """A name for exactly these settings and weights."""
    content = hashlib.sha256(json.dumps(describe_encoder(encoder), sort_keys=True).encode())
    for key, value in sorted(encoder.state_dict().items()):
        content.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        content.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return content.hexdigest()


def save_encoder(encoder: ViTEncoder, folder: str | Path, provenance: dict[str, Any] | None = None) -> Path:
    """Write encoder.json and encoder.safetensors, each whole or not at all.

    Args:
        encoder: what is written.
        folder: made if missing; an encoder already there is replaced.
        provenance: where the weights come from (run settings, step, data), for the reader.

    Raises:
        WriteError: the disk is full or cannot be written to; an encoder already there stays.
    """
    folder = Path(folder)
    weights = {key: value.detach().cpu().contiguous() for key, value in encoder.state_dict().items()}
    about = {"format": FORMAT, "encoder": describe_encoder(encoder), "provenance": provenance or {}}
    # numbers of one list on one line: a palette has 512 of them
    text = re.sub(r"\[\n[-+.\de,\s]+\]", lambda found: re.sub(r"\s+", " ", found[0]), json.dumps(about, indent=2))
    files = [folder / name for name in ("encoder.json", "encoder.safetensors")]
    for file in files:
        remove_stale_parts(file)
    with new_file(files[0]) as description, new_file(files[1]) as part:  # the inner one takes its place first
        save_file(weights, part)
        description.write_text(text + "\n")
    return folder


def load_encoder(
    source: str | Path, layout: str | None = None, heads: int | None = None, weights: str | None = None, **changes: Any
) -> ViTEncoder:
    """An encoder in evaluation mode from anything that holds one; never runs code from the file.

    Args:
        source: a run folder, an encoder folder, a Lightning checkpoint of ours, a released checkpoint file, a folder
            that transformers or timm opens, or timm:NAME for a pretrained model of timm's.
        layout: of a released file: mae, dino, dinov2, timm, transformers or openai_igpt; recognized from the names if
            None.
        heads: attention heads of a released file, which does not say them; 64 channels a head are assumed if None.
        weights: which network of a file with several, by a part of its name, such as student or model_ema; None for
            what its task calls the result, the teacher, or an average over training.
        changes: settings that a released file does not say, such as `palette`.

    Raises:
        FileNotFoundError: nothing is there, or nothing that holds an encoder.
        ValueError: the file is no checkpoint, would run code, holds other weights than its settings say, or says what
            is to be changed.
    """
    said = {key: value for key, value in (("layout", layout), ("heads", heads), ("weights", weights)) if value}
    if str(source).startswith(TIMM):
        reject_overrides(str(source), said)
        return _converted(timm.from_name(str(source).removeprefix(TIMM), **changes), str(source))
    path = find_encoder(source, by_network=weights is not None)
    if path.parent.name == SNAPSHOTS:
        logger.info(f"{printable(source)}: snapshot {printable(path.name)}")
    if path.is_dir():
        with _named(path):
            converted = _from_library(path, changes)
        reject_overrides(str(path), said if converted else said | changes)
        return _converted(converted, path.name) if converted else _assembled(*_read_folder(path), path)
    if not said and (beside := _described_beside(path)) is not None:
        logger.info(f"{path.name}: read with config.json beside it")
        return _converted(_from_library(beside, changes), path.name)
    content = read_torch_file(path)
    if "sslvit" not in content:
        with _named(path):
            converted = to_sslvit(content, layout, heads, weights, str(path), **changes)
        return _converted(converted, path.name)
    said.pop("weights", None)
    reject_overrides(str(path), said | changes)
    settings, state, _ = split_checkpoint(content, path, weights)
    return _assembled(settings, state, path)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of layouts and settings, which may know nothing of a file, name it."""
    try:
        yield
    except ValueError as error:
        if path.name in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error


def _from_library(path: Path, changes: dict[str, Any]) -> Converted | None:
    """What timm or transformers wrote; None for other folders."""
    if (converted := timm.from_folder(path, **changes)) is not None:
        return converted
    if not transformers.is_folder(path):
        return None
    transformers.read_config(path)  # says what the folder is, if it is not of such a model
    weights = unwrap(read_folder_weights(path), str(path)).everything
    return transformers.to_sslvit(weights, path, **changes)


def _described_beside(file: Path) -> Path | None:
    """The folder of timm or transformers that a file of weights is part of, if its config.json says that it is one."""
    if file.name not in FOLDER_FILES or not transformers.is_folder(file.parent):
        return None
    try:
        config = json.loads((file.parent / "config.json").read_text())
    except (OSError, ValueError, RecursionError):
        return None
    is_known = isinstance(config, dict) and (
        "pretrained_cfg" in config or config.get("model_type") in transformers.MODELS
    )
    return file.parent if is_known else None


def reject_overrides(source: str, said: dict[str, Any]) -> None:
    if "weights" in said:
        raise ValueError(f"{source}: holds one network, no student beside a teacher. Leave out weights (--weights).")
    if said:
        raise ValueError(f"{source}: says its own settings. Leave out what is for released files ({', '.join(said)}).")


def _converted(converted: Converted, source: str) -> ViTEncoder:
    source = printable(source)
    for note in converted.notes:
        logger.info(f"{source}: {note}")
    settings = settings_from(asdict(converted.settings), source)  # what a foreign file says is checked as well
    encoder = _assembled(settings, converted.encoder, source)
    logger.info(f"{source}: {converted.account()}")
    return encoder


def _assembled(settings: EncoderSettings, weights: dict[str, Tensor], source: str | Path) -> ViTEncoder:
    check_fits(settings, weights, str(source))
    encoder = ViTEncoder(settings)
    load_strict(encoder, weights, str(source))
    return encoder.eval()


def split_checkpoint(
    content: dict[str, Any], path: Path, network: str | None = None
) -> tuple[EncoderSettings, dict[str, Tensor], dict[str, Tensor]]:
    """Of a checkpoint of a run: an encoder's settings, its weights, and all other weights.

    Args:
        content: as read.
        path: for messages.
        network: student or teacher; None for the one that the task calls its result.

    Raises:
        ValueError: it is damaged, or has no student beside a teacher.
    """
    try:
        record, prefix, state = content["sslvit"]["encoder"], content["sslvit"]["prefix"], content["state_dict"]
        if network is not None and prefix != TEACHER:
            raise ValueError(f"{path}: its task trains one network. Leave out weights (--weights).")
        if network not in (None, "student", "teacher"):
            raise ValueError(f"{path}: holds a student and a teacher, no {network}.")
        prefix = STUDENT if network == "student" else prefix
        encoder = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        others = {key.removeprefix("model."): value for key, value in state.items() if not key.startswith(prefix)}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a whole checkpoint of sslvit ({error}).") from error
    return settings_from(record, path), encoder, others


def find_encoder(source: str | Path, by_network: bool = False) -> Path:
    """The encoder folder or checkpoint file behind a path: itself, its encoder/ or its last checkpoint.

    Args:
        source: a path.
        by_network: prefer a checkpoint, which holds the student too.
    """
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder. Give a run folder, encoder folder or checkpoint.")
    if (path / SNAPSHOTS).is_dir():
        path = _snapshot(path)
    if path.is_file() or transformers.is_folder(path):
        return path
    checkpoint = path / "checkpoints" / "last.ckpt"
    folders = [folder for folder in (path, path / "encoder") if (folder / "encoder.json").exists()]
    if checkpoint.exists() and (by_network or not folders):
        return checkpoint
    if folders:
        return folders[0]
    there = sorted(entry.name for entry in path.iterdir())
    shown = ", ".join(there[:5]) + (f" and {len(there) - 5} more" if len(there) > 5 else "") if there else "nothing"
    raise FileNotFoundError(
        f"{path}: holds no encoder (no encoder.json, encoder/encoder.json or checkpoints/last.ckpt, nor a config.json "
        f"of transformers or timm; there is {printable(shown)}). Has the run written its first checkpoint?"
    )


def _snapshot(folder: Path) -> Path:
    """The snapshot in a folder of the hub's cache (models--NAME) that its main branch stands for.

    Raises:
        ValueError: there are several, or none.
    """
    try:
        main = (folder / "refs" / "main").read_text().strip()
    except (OSError, UnicodeDecodeError):
        main = ""
    found = sorted(entry for entry in (folder / SNAPSHOTS).iterdir() if entry.is_dir())
    named = [entry for entry in found if entry.name == main]
    if len(named or found) != 1:
        names = ", ".join(entry.name for entry in found) or "none"
        raise ValueError(f"{folder}: which snapshot? Give one of {folder / SNAPSHOTS} ({printable(names)}).")
    return (named or found)[0]


def provenance_of(source: str | Path, weights: str | None = None) -> dict[str, Any]:
    """Where the weights come from, as far as their files say: task, step, data and settings of a run.

    Args:
        source: as for load_encoder.
        weights: student or teacher, where one was asked for.
    """
    said = {} if weights is None else {"weights": weights}
    if str(source).startswith(TIMM):
        return {"imported_from": str(source)}
    path = find_encoder(source, by_network=weights is not None)
    if path.is_dir():
        if not (path / "encoder.json").is_file():
            return {"imported_from": path.name}
        found = _read_description(path / "encoder.json").get("provenance")
        return (found if isinstance(found, dict) else {}) | said
    content = read_torch_file(path)
    if "sslvit" not in content:
        return {"imported_from": path.name} | said
    settings = _run_settings(path.parent.parent / "config.yaml")
    found = {"task": settings["task"].get("name"), "settings": settings} if settings else {}
    return found | {"step": content.get("global_step"), "checkpoint": path.name} | said


def _run_settings(file: Path) -> dict[str, Any] | None:
    """config.yaml of a run; None if it is missing or something else."""
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, *YAML_ERRORS):
        return None
    is_ours = isinstance(content, dict) and all(isinstance(content.get(key), dict) for key in ("task", "encoder"))
    return content if is_ours else None


def load_strict(module: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Load weights that must fit exactly.

    Raises:
        ValueError: they do not; the message lists what is missing, unknown or of another shape.
    """
    _compare_shapes(module.state_dict(), weights, source)
    module.load_state_dict(weights)


def check_fits(settings: EncoderSettings, weights: dict[str, Tensor], source: str) -> None:
    """Refuse weights that settings from a file do not describe, before memory is taken for what they describe.

    Raises:
        ValueError: they do not fit; the message lists what is missing, unknown or of another shape.
    """
    other = next((key for key, value in weights.items() if not isinstance(value, Tensor)), None)
    if other is not None:
        raise ValueError(f"{source}: {brief(other)} is a {type(weights[other]).__name__}, not a tensor. Is it damaged?")
    shape = copy.copy(settings)
    shape.depth = min(settings.depth, count_blocks(weights, "blocks.") + 1)
    shape.color_init = "normal"
    if shape.pos_embed in POSITION_TABLES:
        shape.pos_embed = "learned_1d"  # a table of the same shape, without its arithmetic
    try:
        with torch.device("meta"):
            expected = ViTEncoder(shape).state_dict()
    except (RuntimeError, OverflowError, TypeError, MemoryError) as error:  # sizes beyond what a tensor can have
        reason = printable(str(error).splitlines()[0], 120)
        raise ValueError(f"{source}: its settings describe no network that can be built ({reason}).") from error
    _compare_shapes(expected, weights, source, f" of {settings.depth:,} blocks" if shape.depth < settings.depth else "")


def _compare_shapes(own: dict[str, Tensor], weights: dict[str, Tensor], source: str, more: str = "") -> None:
    missing = sorted(own.keys() - weights.keys())
    unknown = sorted(weights.keys() - own.keys())
    shapes = [
        f"{key} is {tuple(weights[key].shape)}, here {tuple(own[key].shape)}"
        for key in own.keys() & weights.keys()
        if own[key].shape != weights[key].shape
    ]
    problems = [
        f"{title} {printable(', '.join(keys[:4]))}{f' and {len(keys) - 4} more' if len(keys) > 4 else ''}"
        for title, keys in (("missing:", missing), ("unknown:", unknown), ("other shape:", sorted(shapes)))
        if keys
    ]
    if problems:
        raise ValueError(f"{source}: these weights are of another architecture{more} ({'; '.join(problems)}).")


def settings_difference(one: EncoderSettings, other: EncoderSettings) -> list[str]:
    """What makes the same weights mean something else, as 'width: 192 and 384'.

    Chance, memory savers, pooling and how positions are resampled for other sizes do not count; a learned and a
    fixed position table are both a table.
    """
    differences = []
    for field in fields(EncoderSettings):
        values = [getattr(settings, field.name) for settings in (one, other)]
        if field.name == "pos_embed":
            values = ["a table" if value in POSITION_TABLES else value for value in values]
        if field.name not in NOT_IN_THE_WEIGHTS and values[0] != values[1]:
            differences.append(f"{field.name}: {brief(values[0])} and {brief(values[1])}")
    return differences


def check_same(there: EncoderSettings, here: EncoderSettings, source: str, besides: Sequence[str] = ()) -> None:
    """Refuse weights that would mean something else here; `besides` are settings that may differ."""
    different = settings_difference(there, here)
    different = [text for text in different if text.split(":")[0] not in besides]
    if different:
        raise ValueError(f"{source}: an encoder of another architecture (there and here {'; '.join(different)}).")


def settings_from(record: dict[str, Any], path: str | Path) -> EncoderSettings:
    """Settings from a file, checked like those of a recipe."""
    try:
        if not isinstance(record, dict):
            raise ValueError(f"its encoder is a {type(record).__name__}, not settings.")
        return build(EncoderSettings, record)
    except ValueError as error:
        raise ValueError(f"{path}: {error} Was it written by another version of sslvit?") from error


def _read_description(file: Path) -> dict[str, Any]:
    try:
        about = json.loads(file.read_text())
        about["encoder"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not an encoder description ({error}).") from error
    return about


def _read_folder(folder: Path) -> tuple[EncoderSettings, dict[str, Tensor]]:
    file = folder / "encoder.json"
    about = _read_description(file)
    if about.get("format") != FORMAT:
        raise ValueError(f"{file}: format {about.get('format')}, but this sslvit reads format {FORMAT}. Update sslvit.")
    return settings_from(about["encoder"], file), read_torch_file(folder / "encoder.safetensors")
