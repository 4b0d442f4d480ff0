"""The one door between training and everything after it: an encoder as a folder, and any file as an encoder.

    encoder.json          settings, preprocessing and where the weights come from
    encoder.safetensors   the weights

Nothing here unpickles code: safetensors hold numbers only, and torch's files are read with weights only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import re
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sslvit.layouts import Converted, timm, to_sslvit, transformers
from sslvit.models import ViTEncoder
from sslvit.settings import EncoderSettings
from sslvit.settings.load import brief, build

FORMAT = 1
TIMM = "timm:"  # before the name of one of timm's pretrained models
POSITION_TABLES = ("learned_1d", "sincos_1d", "sincos_2d")
NOT_IN_THE_WEIGHTS = (
    "dropout", "drop_path", "checkpointing", "initialisation", "colour_start", "mean", "std", "interpolation",
    "feature_layer", "feature_norm", "pooling", "interpolate_antialias", "interpolate_offset",
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
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value.detach().cpu().contiguous() for key, value in encoder.state_dict().items()}
    save_file(weights, folder / "encoder.safetensors.part")
    about = {"format": FORMAT, "encoder": describe_encoder(encoder), "provenance": provenance or {}}
    # numbers of one list on one line: a palette has 512 of them
    text = re.sub(r"\[\n[-+.\de,\s]+\]", lambda found: re.sub(r"\s+", " ", found[0]), json.dumps(about, indent=2))
    (folder / "encoder.json.part").write_text(text + "\n")
    for name in ("encoder.safetensors", "encoder.json"):
        os.replace(folder / f"{name}.part", folder / name)
    return folder


def load_encoder(source: str | Path, layout: str | None = None, heads: int | None = None, **changes: Any) -> ViTEncoder:
    """An encoder in evaluation mode from anything that holds one; never runs code from the file.

    Args:
        source: a run folder, an encoder folder, a Lightning checkpoint of ours, a released checkpoint file, a folder
            that transformers or timm opens, or timm:NAME for a pretrained model of timm's.
        layout: of a released file: mae, dino, dinov2, timm or openai_igpt; recognised from the names if None.
        heads: attention heads of a released file, which does not say them; 64 channels a head are assumed if None.
        changes: settings that a released file does not say, such as `palette`.

    Raises:
        FileNotFoundError: nothing is there, or nothing that holds an encoder.
        ValueError: the file is no checkpoint, would run code, holds other weights than its settings say, or says what
            is to be changed.
    """
    if str(source).startswith(TIMM):
        return _converted(timm.from_name(str(source).removeprefix(TIMM), **changes), str(source))
    path = find_encoder(source)
    if path.is_dir() and (converted := timm.from_folder(path, **changes)) is not None:
        return _converted(converted, path.name)
    if path.is_dir() and transformers.is_folder(path):
        transformers.read_config(path)  # says what the folder is, if it is not of such a model
        return _converted(
            transformers.to_sslvit(read_torch_file(path / "model.safetensors"), path, **changes), path.name
        )
    content = {} if path.is_dir() else read_torch_file(path)
    if path.is_dir() or "sslvit" in content:
        changes |= {key: value for key, value in (("layout", layout), ("heads", heads)) if value is not None}
        if changes:
            raise ValueError(
                f"{path}: says its own settings. Leave out what is for released files ({', '.join(changes)})."
            )
        settings, weights = _read_folder(path) if path.is_dir() else own_parts(content, path)[:2]
    else:
        return _converted(to_sslvit(weights_in(content, path), layout, heads, **changes), path.name)
    encoder = ViTEncoder(settings)
    put_weights(encoder, weights, str(path))
    return encoder.eval()


def _converted(converted: Converted, source: str) -> ViTEncoder:
    for note in converted.notes:
        print(f"{source}: {note}")
    encoder = ViTEncoder(converted.settings)
    put_weights(encoder, converted.encoder, source)
    return encoder.eval()


def own_parts(content: dict[str, Any], path: Path) -> tuple[EncoderSettings, dict[str, Tensor], dict[str, Tensor]]:
    """Of a checkpoint of a run: the trained encoder's settings, its weights, and all other weights.

    Raises:
        ValueError: it is damaged.
    """
    try:
        record, prefix, state = content["sslvit"]["encoder"], content["sslvit"]["prefix"], content["state_dict"]
        encoder = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        others = {key: value for key, value in state.items() if not key.startswith(prefix)}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a whole checkpoint of sslvit ({error}).") from error
    return settings_from(record, path), encoder, others


def find_encoder(source: str | Path) -> Path:
    """The encoder folder or checkpoint file behind a path: itself, its encoder/ or its last checkpoint."""
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder. Give a run folder, encoder folder or checkpoint.")
    if path.is_file():
        return path
    if transformers.is_folder(path):
        return path
    for candidate in (path, path / "encoder"):
        if (candidate / "encoder.json").exists():
            return candidate
    if (path / "checkpoints" / "last.ckpt").exists():
        return path / "checkpoints" / "last.ckpt"
    raise FileNotFoundError(
        f"{path}: holds no encoder (no encoder.json, encoder/encoder.json or checkpoints/last.ckpt). "
        "Has the run written its first checkpoint?"
    )


def put_weights(encoder: ViTEncoder, weights: dict[str, Tensor], source: str) -> None:
    """Load weights that must fit exactly.

    Raises:
        ValueError: they do not; the message lists what is missing, unknown or of another shape.
    """
    own = encoder.state_dict()
    missing = sorted(own.keys() - weights.keys())
    unknown = sorted(weights.keys() - own.keys())
    shapes = [
        f"{key} is {tuple(weights[key].shape)}, here {tuple(own[key].shape)}"
        for key in own.keys() & weights.keys()
        if own[key].shape != weights[key].shape
    ]
    problems = [
        f"{title} {', '.join(keys[:4])}{f' and {len(keys) - 4} more' if len(keys) > 4 else ''}"
        for title, keys in (("missing:", missing), ("unknown:", unknown), ("other shape:", sorted(shapes)))
        if keys
    ]
    if problems:
        raise ValueError(f"{source}: these weights are of another architecture ({'; '.join(problems)}).")
    encoder.load_state_dict(weights)


def settings_difference(one: EncoderSettings, other: EncoderSettings) -> list[str]:
    """What makes the same weights mean something else, as 'width: 192 and 384'.

    Chance, memory savers, pooling and how positions are resampled for other sizes do not count; a learned and a
    fixed position table are both a table.
    """
    differences = []
    for field in fields(EncoderSettings):
        values = [getattr(settings, field.name) for settings in (one, other)]
        if field.name == "positions":
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


def settings_from(record: dict[str, Any], path: Path) -> EncoderSettings:
    """Settings from a file, checked like those of a recipe."""
    try:
        return build(EncoderSettings, record)
    except ValueError as error:
        raise ValueError(f"{path}: {error} Was it written by another version of sslvit?") from error


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a released file, out of wrappers such as "model", "teacher" or "state_dict"."""
    return weights_in(read_torch_file(Path(path)), Path(path))


def weights_in(content: dict[str, Any], path: Path) -> dict[str, Tensor]:
    for wrapper in ("teacher", "model", "state_dict"):  # DINO's full checkpoint: the teacher is the result
        if isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    weights = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if not weights:
        raise ValueError(f"{path}: holds no weights (its entries: {', '.join(map(str, list(content)[:6]))}).")
    return weights


def read_torch_file(path: Path) -> dict[str, Any]:
    """A .safetensors file, an .npz of arrays or a torch file, read so that nothing in it can run.

    Raises:
        ValueError: it is neither, it is damaged, or it holds more than numbers.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        with torch.serialization.safe_globals([argparse.Namespace]):  # DINO's files hold their command line
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: refused, because it holds objects besides tensors and loading those could run code. "
            "Ask its author for a file of weights only (.safetensors), or re-save its state dict where you trust it."
        ) from error
    except Exception as error:  # damaged bytes make torch's reader raise almost anything
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise ValueError(f"{path}: not a readable checkpoint ({reason}). Is the download complete?") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a checkpoint with named weights.")
    return content


def _read_folder(folder: Path) -> tuple[EncoderSettings, dict[str, Tensor]]:
    file = folder / "encoder.json"
    try:
        about = json.loads(file.read_text())
        record = about["encoder"]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not an encoder description ({error}).") from error
    if about.get("format") != FORMAT:
        raise ValueError(f"{file}: format {about.get('format')}, but this sslvit reads format {FORMAT}. Update sslvit.")
    return settings_from(record, file), read_torch_file(folder / "encoder.safetensors")
