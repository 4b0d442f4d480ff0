"""Saving an encoder as a folder, and loading one from any file or folder that contains one.

    encoder.json          settings, preprocessing and the origin of the weights
    encoder.safetensors   the weights

No pickled code is ever run (see weight_files.py).
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from sslvit import zoo
from sslvit.compatibility import check_fits, load_strict, settings_from
from sslvit.data.preprocess import ImageLike, preprocess
from sslvit.files import expand_path, new_file, printable, remove_stale_temporaries
from sslvit.layouts import Converted, backbones, hub, timm_models, to_sslvit, transformers_folder
from sslvit.layouts.unwrap import unwrap
from sslvit.messages import for_python
from sslvit.models import Backbone, Encoder, ViTEncoder, device_and_dtype
from sslvit.models.networks import BackboneLike, given_backbone, make_network
from sslvit.results import html_table
from sslvit.settings import EncoderSettings
from sslvit.settings.encoder import OF_A_BACKBONE, OWN
from sslvit.settings.load import MADE_BY, YAML_ERRORS
from sslvit.sharded_checkpoint import read_checkpoint
from sslvit.weight_files import FOLDER_FILES, read_folder_weights, read_torch_file

logger = logging.getLogger(__name__)

FORMAT = 1
HEAD = "head.safetensors"  # next to an encoder: the classifier that was trained with it
TIMM = "timm:"  # name prefix of timm's pretrained models
LIBRARIES = (TIMM, "torchvision:")
SNAPSHOTS = "snapshots"  # subfolder of a model in the hub's cache
STUDENT, TEACHER = "model.encoder.", "model.teacher."  # key prefixes in checkpoints of tasks with both networks


class Preprocesses:
    """Mixin for loaded encoders, which know how to preprocess images."""

    settings: EncoderSettings

    def preprocess(self, images: ImageLike | Sequence[ImageLike]) -> Tensor:
        """Prepare images as evaluation does: turned upright, resized, cropped, and normalized to a batch 'b c h w'.

        Args:
            images: One image or several: paths, PIL images, or arrays 'h w' or 'h w c' of 8 or 16 bits.

        Raises:
            ValueError: Not such an image, or an array of floating-point values, whose range is unknown.
            FileNotFoundError: A file does not exist.

        Example:
            features = encoder.features(encoder.preprocess("dog.jpg"))
        """
        assert isinstance(self, nn.Module)
        return preprocess(images, self.settings).to(*device_and_dtype(self))

    def to_dict(self) -> dict[str, Any]:
        """The encoder's settings as plain values, as in encoder.json."""
        assert isinstance(self, (ViTEncoder, Backbone))
        return describe_encoder(self)

    def _repr_html_(self) -> str:
        return html_table(("", ""), self.to_dict().items())


class LoadedEncoder(Preprocesses, ViTEncoder):
    """A `ViTEncoder` loaded from a file."""


class LoadedBackbone(Preprocesses, Backbone):
    """A `Backbone` loaded from a file or by name."""


def describe_encoder(encoder: Encoder) -> dict[str, Any]:
    """The settings that apply to this encoder, as plain dicts, lists, strings and numbers."""
    found = asdict(encoder.settings)
    is_backbone = encoder.settings.backbone is not None
    return {key: value for key, value in found.items() if key in OF_A_BACKBONE} if is_backbone else found


def fingerprint(encoder: Encoder) -> str:
    """Hash the settings and weights; for a module passed from Python, also its repr and its output on a fixed input."""
    content = hashlib.sha256(json.dumps(describe_encoder(encoder), sort_keys=True).encode())
    for key, value in sorted(encoder.state_dict().items()):
        content.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        content.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    if isinstance(encoder, Backbone) and encoder.settings.backbone == OWN:  # no name identifies its code
        content.update(repr(encoder.net).encode() + encoder.answer().cpu().numpy().tobytes())
    return content.hexdigest()


def save_encoder(encoder: Encoder, folder: str | Path, provenance: dict[str, Any] | None = None) -> Path:
    """Write encoder.json and encoder.safetensors, each atomically.

    Args:
        encoder: The encoder.
        folder: The folder, created if missing; an encoder already there is replaced.
        provenance: Origin of the weights (run settings, step, data), for the record.

    Raises:
        WriteError: The disk is full or not writable; an encoder already there is kept.
    """
    folder = Path(expand_path(folder))
    weights = {key: value.detach().cpu().contiguous() for key, value in encoder.state_dict().items()}
    description = {"format": FORMAT, "encoder": describe_encoder(encoder), "provenance": provenance or {}}
    # lists of numbers go on one line each, since a palette has 512 colors
    text = re.sub(r"\[\n[-+.\de,\s]+\]", lambda found: re.sub(r"\s+", " ", found[0]), json.dumps(description, indent=2))
    files = [folder / name for name in ("encoder.json", "encoder.safetensors")]
    for file in files:
        remove_stale_temporaries(file)
    with new_file(files[0]) as json_file, new_file(files[1]) as weight_file:  # the inner one is renamed first
        save_file(weights, weight_file)
        json_file.write_text(text + "\n")
    return folder


@for_python
def load_encoder(
    source: str | Path, layout: str | None = None, heads: int | None = None, weights: str | None = None,
    backbone: BackboneLike | None = None, **changes: Any,
) -> LoadedEncoder | LoadedBackbone:  # fmt: skip
    """Load an encoder in evaluation mode from a file, folder or name; code in the file is never run.

    Args:
        source: A run folder, an encoder folder, an sslvit checkpoint, a released checkpoint file, a folder that
            transformers or timm can open, zoo:NAME from docs/record.md, hf:ORG/NAME[@REVISION] from the Hugging Face
            hub, timm:NAME for one of timm's pretrained models, or the name of another network, such as
            torchvision:resnet18@IMAGENET1K_V1.
        layout: Layout of a released file: mae, dino, dinov2, dinov3, timm, transformers or openai_igpt; None to
            recognize it by its parameter names.
        heads: Number of attention heads, which a released file does not include; None for one per 64 channels.
        weights: Which of several networks in a file to load, by part of its name, such as student or model_ema. None
            for the task's result, the teacher, or an average over training.
        backbone: The Python module that a run trained, or a function that makes it; run folders do not contain its
            code.
        changes: Settings that a released file does not include, such as `palette`.

    Raises:
        FileNotFoundError: Nothing is there, or it contains no encoder.
        ValueError: Not a checkpoint, a file that would run code, weights that do not match their settings, or a change
            to a setting that the file already specifies.

    Example:
        encoder = sslvit.load_encoder("runs/photos")
        features = encoder.features(encoder.preprocess(["dog.jpg", "cat.jpg"]))
    """
    if backbone is not None:
        with given_backbone(backbone):
            return load_encoder(source, layout, heads, weights, **changes)
    overrides = {key: value for key, value in (("layout", layout), ("heads", heads), ("weights", weights)) if value}
    if str(source).startswith(LIBRARIES) and backbones.is_name(str(source)):
        reject_overrides(str(source), overrides)
        return _build_converted(backbones.from_name(str(source), **changes), str(source))
    if str(source).startswith(TIMM):
        reject_overrides(str(source), overrides)
        return _build_converted(timm_models.from_name(str(source).removeprefix(TIMM), **changes), str(source))
    path = find_encoder(source, by_network=weights is not None)
    if path.parent.name == SNAPSHOTS:
        logger.info(f"{printable(source)}: snapshot {printable(path.name)}")
    if path.is_dir():
        with _naming(path):
            converted = _from_library(path, changes)
        if converted is not None:
            reject_overrides(str(path), overrides)
            return _build_converted(converted, path.name)
        reject_overrides(str(path), overrides | changes)
        return _build(*_read_folder(path), path)
    if not overrides and _is_in_library_folder(path):
        logger.info(f"{path.name}: read with config.json beside it")
        if (converted := _from_library(path.parent, changes)) is not None:
            return _build_converted(converted, path.name)
    content = read_checkpoint(path)
    if "sslvit" not in content:
        with _naming(path):
            converted = to_sslvit(content, layout, heads, weights, str(path), **changes)
        return _build_converted(converted, path.name)
    overrides.pop("weights", None)
    reject_overrides(str(path), overrides | changes)
    settings, state, _ = split_checkpoint(content, path, weights)
    return _build(settings, state, path)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Prefix errors of layouts and settings with the file's path, which they may not know."""
    try:
        yield
    except ValueError as error:
        if path.name in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error


def _from_library(path: Path, changes: dict[str, Any]) -> Converted | None:
    """Read a folder written by timm or transformers; None for other folders."""
    if (converted := timm_models.from_folder(path, **changes)) is not None:
        return converted
    if not transformers_folder.is_folder(path):
        return None
    transformers_folder.read_config(path)  # raises a clear error if the folder is for an unsupported model
    weights = unwrap(read_folder_weights(path), str(path)).everything
    return transformers_folder.to_sslvit(weights, path, **changes)


def _is_in_library_folder(file: Path) -> bool:
    """Whether a weight file lies next to a config.json of timm or transformers."""
    config = transformers_folder.stated(file.parent) if file.name in FOLDER_FILES else {}
    return "pretrained_cfg" in config or config.get("model_type") in transformers_folder.MODELS


def reject_overrides(source: str, overrides: dict[str, Any]) -> None:
    """Refuse options meant for released files, since this source includes its own settings."""
    if "weights" in overrides:
        raise ValueError(f"{source}: holds one network, no student beside a teacher. Remove --weights.")
    if overrides:
        raise ValueError(
            f"{source}: already stores its settings; remove what is for released files ({', '.join(overrides)})."
        )


def _build_converted(converted: Converted, source: str) -> LoadedEncoder | LoadedBackbone:
    source = printable(source)
    for note in converted.notes:
        logger.info(f"{source}: {note}")
    settings = settings_from(asdict(converted.settings), source)  # foreign files are validated, too
    encoder = _build(settings, converted.encoder, source)
    if converted.num_read:
        logger.info(f"{source}: {converted.summary()}")
    return encoder


def _build(settings: EncoderSettings, weights: dict[str, Tensor], source: str | Path) -> LoadedEncoder | LoadedBackbone:
    check_fits(settings, weights, str(source))
    encoder: LoadedEncoder | LoadedBackbone
    if settings.backbone is None:
        encoder = LoadedEncoder(settings)
    else:
        try:
            encoder = LoadedBackbone(make_network(settings), settings)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
    load_strict(encoder, weights, str(source))
    return encoder.eval()


def split_checkpoint(
    content: dict[str, Any], path: Path, network: str | None = None
) -> tuple[EncoderSettings, dict[str, Tensor], dict[str, Tensor]]:
    """Split a run's checkpoint into the encoder's settings, the encoder's weights, and all other weights.

    Args:
        content: Content of the checkpoint.
        path: Its file, for messages.
        network: student or teacher; None for the task's result.

    Raises:
        ValueError: The checkpoint is damaged, or does not have a student and a teacher.
    """
    try:
        settings, prefix, state = content["sslvit"]["encoder"], content["sslvit"]["prefix"], content["state_dict"]
        if network is not None and prefix != TEACHER:
            raise ValueError(f"{path}: its task trains one network. Remove --weights.")
        if network not in (None, "student", "teacher"):
            raise ValueError(f"{path}: holds a student and a teacher, no {network}.")
        prefix = STUDENT if network == "student" else prefix
        encoder = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        others = {key.removeprefix("model."): value for key, value in state.items() if not key.startswith(prefix)}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a complete checkpoint of sslvit ({error}).") from error
    return settings_from(settings, path), encoder, others


def find_encoder(source: str | Path, by_network: bool = False) -> Path:
    """Find the encoder folder or checkpoint file for a path: itself, its encoder/ or its last checkpoint.

    With `by_network` a checkpoint is preferred, since it also contains the student.
    """
    if zoo.is_name(source):
        return zoo.find(str(source))
    path = hub.snapshot(str(source)) if hub.is_name(source) else Path(expand_path(source))
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder. Give a run folder, encoder folder or checkpoint.")
    if (path / SNAPSHOTS).is_dir():
        path = _snapshot(path)
    if path.is_file() or transformers_folder.is_folder(path):
        return path
    checkpoint = path / "checkpoints" / "last.ckpt"
    folders = [folder for folder in (path, path / "encoder") if (folder / "encoder.json").exists()]
    if checkpoint.exists() and (by_network or not folders):
        return checkpoint
    if folders:
        return folders[0]
    names = sorted(entry.name for entry in path.iterdir())
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    found = printable(", ".join(names[:5]) + more if names else "nothing")
    raise FileNotFoundError(
        f"{path}: holds no encoder (no encoder.json, encoder/encoder.json or checkpoints/last.ckpt, nor a config.json "
        f"of transformers or timm; there is {found}). Has the run written its first checkpoint?"
    )


def _snapshot(folder: Path) -> Path:
    """The snapshot of the main branch in a folder of the hub's cache (models--NAME), or the only snapshot there."""
    try:
        main = (folder / "refs" / "main").read_text().strip()
    except (OSError, UnicodeDecodeError):
        main = ""
    snapshots = sorted(entry for entry in (folder / SNAPSHOTS).iterdir() if entry.is_dir())
    found = [entry for entry in snapshots if entry.name == main] or snapshots
    if len(found) != 1:
        names = ", ".join(entry.name for entry in found) or "none"
        raise ValueError(f"{folder}: which snapshot? Give one of {folder / SNAPSHOTS} ({printable(names)}).")
    return found[0]


def provenance_of(source: str | Path, weights: str | None = None) -> dict[str, Any]:
    """Origin of the weights as far as the source records it: task, step, data and settings of the run."""
    network = {} if weights is None else {"weights": weights}
    if str(source).startswith(LIBRARIES):
        return {"imported_from": str(source)}
    path = find_encoder(source, by_network=weights is not None)
    if path.is_dir():
        if not (path / "encoder.json").is_file():
            is_named = hub.is_name(source)  # a snapshot's folder is named by its commit
            return {"imported_from": f"{str(source).partition('@')[0]}@{path.name}" if is_named else path.name}
        found = _read_description(path / "encoder.json").get("provenance")
        return (found if isinstance(found, dict) else {}) | network
    content = read_checkpoint(path)
    if "sslvit" not in content:
        return {"imported_from": path.name} | network
    settings = _run_settings(path.parent.parent / "config.yaml")
    run = {"task": settings["task"].get("name"), "settings": settings} if settings else {}
    return run | {"step": content.get("global_step"), "checkpoint": path.name} | network


def _run_settings(file: Path) -> dict[str, Any] | None:
    """The content of a run's config.yaml; None if it is missing or not a run's."""
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, *YAML_ERRORS):
        return None
    is_ours = isinstance(content, dict) and all(isinstance(content.get(key), dict) for key in ("task", "encoder"))
    return {key: value for key, value in content.items() if key != MADE_BY} if is_ours else None


def _read_description(file: Path) -> dict[str, Any]:
    try:
        description = json.loads(file.read_text())
        description["encoder"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not an encoder description ({error}).") from error
    return description


def _read_folder(folder: Path) -> tuple[EncoderSettings, dict[str, Tensor]]:
    file = folder / "encoder.json"
    description = _read_description(file)
    version = description.get("format")
    if version != FORMAT:
        raise ValueError(f"{file}: format {version}, but this sslvit reads format {FORMAT}. Update sslvit.")
    return settings_from(description["encoder"], file), read_torch_file(folder / "encoder.safetensors")
