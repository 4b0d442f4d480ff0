"""Encoder -> the formats of other libraries, each reopened and compared before success is reported."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sslvit.checkpoint import load_encoder
from sslvit.export import onnx, safetensors, timm, torch, transformers
from sslvit.export.card import CARD, in_quotes, known_scores, make_card, write_card
from sslvit.export.exported import with_outputs
from sslvit.export.verify import (
    SHOWN,
    check_inputs,
    compare,
    compare_preprocessing,
    compare_weights,
    shortfall,
    with_unit_scale,
)
from sslvit.files import WriteError, is_disk_error, write_error
from sslvit.progress import quiet_libraries

FORMATS = {"timm": timm, "transformers": transformers, "onnx": onnx, "torch": torch, "safetensors": safetensors}
MARK = "verdict.json"
MAKING = ".export-in-the-making"


def export_encoder(
    source: str | Path,
    out: str | Path,
    kind: str,
    outputs: str = "features",
    size: str | None = None,
    weights: str | None = None,
    scores: Sequence[str | Path] = (),
    overwrite: bool = False,
    **released: Any,
) -> dict[str, Any]:
    """Write an encoder in another library's format, reopen it there and compare its outputs.

    Args:
        source: anything that load_encoder takes.
        out: folder to write.
        kind: timm, transformers, onnx, torch or safetensors.
        outputs: tokens (the encoder alone), features (pooled) or logits (a fine-tuned run's classifier).
        size: fixed (images of the training size) or dynamic (any that the patch divides); None for dynamic where timm
            and transformers stretch positions as this encoder does, and for fixed with onnx and torch.
        weights: student or teacher, of a checkpoint that holds both.
        scores: files of scores for the card.
        overwrite: replace an earlier export there.
        released: what a released file does not say (layout, heads, image_size, palette).

    Returns:
        The verdict, which also lies in verdict.json.

    Raises:
        ValueError: the folder is in use, the format is unknown or cannot hold the encoder, or scores are of another.
        WriteError: the disk is full or cannot be written to; nothing is left.
        RuntimeError: what was written gives other outputs, or none; it stays in OUT.part, with the verdict.
    """
    out = Path(out)
    if kind not in FORMATS:
        raise ValueError(f"--format {kind}: not one of {', '.join(FORMATS)}.")
    check_place(out, overwrite)
    known_scores(source, [Path(file) for file in scores])
    encoder = load_encoder(source, weights=weights, **released)
    known_scores(source, [Path(file) for file in scores], encoder)
    exported = with_outputs(encoder, source, outputs, weights)
    writer = FORMATS[kind]
    is_fixed = writer.check(exported, size)
    part = fresh_part(out)
    verdict: dict[str, Any] = {"format": kind, "outputs": outputs, "image_sizes": "fixed" if is_fixed else "any"}
    failure = ""
    with whole_folder(part), quiet_libraries():
        try:
            writer.write(exported, part, is_fixed)
            reopened = writer.reopen(part, exported, is_fixed)
            inputs = check_inputs(exported.settings, is_fixed)
            verdict |= compare(exported, reopened, inputs)
            verdict["weights"] = compare_weights(*writer.weights(part, exported, is_fixed))
            if hasattr(writer, "reopen_with_unit_scale") and exported.settings.layer_scale is not None:
                louder = writer.reopen_with_unit_scale(part, exported)
                verdict["unit_layer_scale"] = compare(with_unit_scale(exported), louder, inputs)
            if hasattr(writer, "preprocessing") and exported.settings.channels in SHOWN:
                verdict["preprocessing"] = compare_preprocessing(exported, writer.preprocessing(part, exported))
        except Exception as error:  # of another library: it may raise anything
            if is_full_disk(error):
                raise
            failure = " ".join(str(error).split())[:300] or type(error).__name__
            verdict |= {"passed": False, "failure": failure}
        parts = {
            "the reopened encoder": verdict, "with every LayerScale set to one it": verdict.get("unit_layer_scale", {}),
            "among its weights": verdict.get("weights", {}), "its preprocessing": verdict.get("preprocessing", {}),
        }  # fmt: skip
        for what, found in parts.items():
            if not failure and found.get("passed") is False:
                failure = f"{what} {shortfall(found)}"
        verdict["passed"] = not failure
        verdict["files"] = sorted([*(path.name for path in part.iterdir() if path.name != MAKING), MARK, *CARD])
        (part / MARK).write_text(json.dumps(in_json(verdict), indent=1) + "\n")
        if failure:
            raise RuntimeError(f"{out}: not written, because {failure}; what was tried is in {part}.")
        card = make_card(exported, source, kind, is_fixed, [Path(file) for file in scores])
        write_card(
            card, verdict, writer.how_to_open(exported, is_fixed).replace("FOLDER", in_quotes(out)), part, out.name
        )
    take_place(part, out)
    return verdict


def is_full_disk(error: BaseException) -> bool:
    """Whether a write failed. What other libraries raise as OSError without a number is something else."""
    if isinstance(error, OSError) and not isinstance(error, WriteError):
        return error.errno is not None and not isinstance(error, FileNotFoundError)
    if isinstance(error, SafetensorError):
        return "os error" in str(error)  # and not a file that it cannot read
    return is_disk_error(error)


@contextmanager
def whole_folder(part: Path) -> Iterator[None]:
    """A folder that is written while the block runs, and removed where the disk does not take it.

    Raises:
        WriteError: the disk is full or cannot be written to.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not is_full_disk(error):
            raise
        shutil.rmtree(part, ignore_errors=True)
        raise error if isinstance(error, WriteError) else write_error(part, error) from error
    except Exception:  # the verdict's: what was tried stays
        raise
    except BaseException:  # told to stop
        shutil.rmtree(part, ignore_errors=True)
        raise


def take_place(part: Path, out: Path) -> None:
    """A finished folder takes the place that was asked for; what others put into an earlier export moves over.

    The earlier one steps aside and goes last, so that nothing of it is lost where this process is killed in between.
    """
    (part / MAKING).unlink()
    old = replaced_by(out)
    if out.exists():
        out.rename(old)
    part.rename(out)
    finish_replacement(out)


def replaced_by(out: Path) -> Path:
    """Where an earlier export waits until the new one is in its place."""
    return out.with_name(f"{out.name}.replaced")


def finish_replacement(out: Path) -> None:
    """Remove an export that was replaced, once what others put into it has moved; put it back where nothing did."""
    old = replaced_by(out)
    if not old.is_dir() or old.is_symlink() or (any(old.iterdir()) and not (old / MARK).exists()):
        return
    if not out.exists():
        old.rename(out)
        return
    keep_others(old, out)
    if not set(os.listdir(old)) - {*made_in(old)}:
        shutil.rmtree(old)


def check_place(out: Path, overwrite: bool = False, may_overwrite: bool = True) -> None:
    """Refuse, before any work, a folder that is in use or cannot be made.

    Args:
        out: the folder.
        overwrite: an earlier export there is to be replaced.
        may_overwrite: the command has --overwrite.
    """
    finish_replacement(out)
    if replaced_by(out).exists():
        raise ValueError(f"{replaced_by(out)}: in the way. Move it, or choose another name.")
    if out.is_symlink() or out.is_file():
        raise ValueError(f"{out}: is a {'link' if out.is_symlink() else 'file'}. Choose the name of a new folder.")
    if out.exists() and any(out.iterdir()):
        if not overwrite:
            more = ", or pass --overwrite" if may_overwrite else ""
            raise ValueError(f"{out}: already exists. Choose another folder{more}.")
        if not (out / MARK).exists():
            raise ValueError(f"{out}: not an earlier export (no {MARK}), so --overwrite leaves it alone.")
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"{out}: {parent} is no folder that can be written to. Choose another place.")


def fresh_part(out: Path) -> Path:
    """An empty folder beside the place; what an export that failed left there goes, nothing else does."""
    part = out.with_name(f"{out.name}.part")
    is_left = part.is_dir() and ((part / MAKING).exists() or (part / MARK).exists() or not any(part.iterdir()))
    if part.is_symlink() or (part.exists() and not is_left):
        raise ValueError(f"{part}: in the way, and not of an earlier export. Move it, or choose another name.")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"{part}: cannot be made ({error.strerror}). Choose another place.") from error
    with whole_folder(part):
        (part / MAKING).write_text("an export is made here; the folder may go\n")
    return part


def made_in(folder: Path) -> set[str]:
    """Names that an export wrote there itself, as far as its verdict can be read."""
    try:
        made = json.loads((folder / MARK).read_text()).get("files", [])
    except (OSError, ValueError, AttributeError):
        made = []
    return {MARK, *CARD, *(name for name in made if isinstance(name, str))}


def keep_others(old: Path, new: Path) -> None:
    """What others put into an earlier export stays."""
    made = made_in(old)
    for path in old.iterdir():
        if path.name not in made and not (new / path.name).exists():
            path.rename(new / path.name)


def in_json(value: Any) -> Any:
    """With null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: in_json(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
