"""Start a run from a trained encoder's weights: differences are adapted and logged, or refused."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from sslvit.compatibility import POSITION_TABLES, check_same, load_strict
from sslvit.files import printable
from sslvit.models import Backbone, Encoder
from sslvit.models.mae import MAEModel
from sslvit.models.resize import OF_ANY_GRID, convert_channels, resize_patches, resize_weights
from sslvit.ranks import is_first_rank
from sslvit.settings import EncoderSettings, MAESettings
from sslvit.settings.load import brief
from sslvit.tasks.released import decoder_beside

logger = logging.getLogger(__name__)

CLOSE = 1e-4  # tolerance for entries of a position table, which are at most 1, to equal the fixed table
# settings of the trained encoder that the run may change; the run's own apply
READINGS = ("mean", "std", "interpolation", "crop_mode", "crop_fraction", "pooling", "feature_layer", "feature_norm",
            "interpolate_antialias", "interpolate_offset")  # fmt: skip


def adaptable(there: EncoderSettings) -> tuple[str, ...]:
    """Settings of a trained encoder that may differ in the run: image size, patch size and channels."""
    if there.backbone is not None:
        return ("image_size",)
    return ("image_size", "patch", "channels") if there.tokens == "patch" else ("image_size",)


def begin_with(
    encoder: Encoder, start: Encoder, source: str, besides: tuple[str, ...] = (), ends: tuple[str, ...] = ()
) -> None:
    """Load a trained encoder's weights into a new one, and log what changed.

    Args:
        encoder: The run's encoder, with initial weights.
        start: the trained encoder.
        source: the origin of the trained encoder, for messages.
        besides: settings that may differ (compatibility.check_same).
        ends: prefixes of names in the new encoder that may have no weights in the trained one.

    Raises:
        ValueError: another architecture, or positions that the new encoder cannot represent.
    """
    there, here = start.settings, encoder.settings
    check_same(there, here, source, besides=besides)
    if isinstance(start, Backbone):
        load_strict(encoder, start.state_dict(), source)
        return
    fresh, notes = encoder.state_dict(), []
    given = dict(resize_weights(start.state_dict(), there, here))
    if there.grid != here.grid and there.pos_embed not in OF_ANY_GRID:
        grids = [f"{rows} x {columns}" for rows, columns in (there.grid, here.grid)]
        notes.append(f"positions interpolated from {grids[0]} to {grids[1]} patches")
    notes += _adapt_positions(given, fresh, there.pos_embed, here.pos_embed, source)
    notes += _adapt_patches(given, there, here)
    if new := [key for key in fresh if key not in given]:
        wrong = [key for key in new if not key.startswith(ends)]
        if wrong or not ends:
            raise ValueError(f"{source}: has no weights for {printable(', '.join(wrong[:4]))}.")
        notes.append(f"new: {', '.join(new)}")
    if left := [key for key in given if key not in fresh]:
        notes.append(f"left out: {', '.join(left)}")
    if different := changes_in_words(*({key: getattr(of, key) for key in READINGS} for of in (there, here))):
        notes.append(f"the run's settings hold: {', '.join(different)}")
    load_strict(encoder, fresh | {key: value for key, value in given.items() if key in fresh}, source)
    if notes and is_first_rank():
        logger.info(f"starting from {printable(source)}: {'; '.join(notes)}")


def begin_decoder(model: MAEModel, start: EncoderSettings, source: str) -> None:
    """Load the decoder that comes with a source's encoder if the settings of both agree, and log it.

    Args:
        model: The run's model, with initial weights.
        start: settings of the source's encoder.
        source: the origin of the encoder; only a folder of transformers' ViTMAEForPreTraining states all settings of a
            decoder.
    """
    found = decoder_beside(source)
    if found is None:
        return
    (there, weights), fresh = found, model.decoder.state_dict()
    here = _decoder_settings(model.settings, model.encoder.settings)
    if differences := changes_in_words(_decoder_settings(there, start), here):
        note = f"decoder: new, as other settings were those of the weights ({', '.join(differences)})"
    else:
        given = {key.removeprefix("decoder."): value for key, value in weights.items()}
        if start.grid != model.encoder.settings.grid:
            given["pos_embed"] = fresh["pos_embed"]  # a fixed table, and the run's grid has its own
        load_strict(model.decoder, given, source)
        note = "decoder: taken over, too"
    if is_first_rank():
        logger.info(f"starting from {printable(source)}: {note}")


def _decoder_settings(task: MAESettings, encoder: EncoderSettings) -> dict[str, Any]:
    """Settings that must agree for a run to use a decoder's weights, by dotted key."""
    fields = ("decoder_width", "decoder_depth", "decoder_heads", "target", "hog_weight")
    found = {f"task.{key}": getattr(task, key) for key in fields}
    found |= {f"encoder.{key}": getattr(encoder, key) for key in ("patch", "channels")}
    return found | {"task.decoder_mlp_ratio": task.decoder_mlp_ratio or encoder.mlp_ratio}


def changes_in_words(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Settings that differ, such as 'task.target raw -> normalized'."""
    return [f"{key} {brief(before.get(key))} -> {brief(now[key])}" for key in now if before.get(key) != now[key]]


def _adapt_patches(given: dict[str, Tensor], there: EncoderSettings, here: EncoderSettings) -> list[str]:
    """Convert the patch embedding in `given` to other patches or channels; returns notes on it."""
    notes, key = [], "patch_embed.proj.weight"
    if there.channels != here.channels:
        given[key] = convert_channels(given[key], here.channels)
        notes.append(f"patch embedding averaged from {there.channels} to {here.channels} channels")
    if there.patch != here.patch:
        given[key] = resize_patches(given[key], here.patch)
        sizes = [f"{side} x {side}" for side in (there.patch, here.patch)]
        notes.append(f"patch embedding resized from {sizes[0]} to {sizes[1]} pixels")
    return notes


def _adapt_positions(
    given: dict[str, Tensor], fresh: dict[str, Tensor], there: str, here: str, source: str
) -> list[str]:
    """Adapt a position table of another kind in `given`; returns notes on it. A fixed table must equal the run's own.

    Raises:
        ValueError: the table in the weights differs from the run's fixed one.
    """
    if there == here or here not in POSITION_TABLES:
        return []
    if here == "learned_1d":
        return [f"pos_embed: a table of {there}, learned from here on"]
    if not torch.allclose(given["pos_embed"].float(), fresh["pos_embed"].float(), rtol=0, atol=CLOSE):
        raise ValueError(
            f"{source}: its positions ({there}) are another table than the fixed one of this run (encoder.pos_embed: "
            f"{here}), which would not learn to be it. Set encoder.pos_embed to {there}, as in the weights."
        )
    given["pos_embed"] = fresh["pos_embed"]
    return [f"pos_embed: {there} in the weights, and the same table as {here}, which stays fixed"]
