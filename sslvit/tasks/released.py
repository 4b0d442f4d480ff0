"""Complete models, including decoders and heads: loaded from released weights and runs, and converted back."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import Tensor

from sslvit import zoo
from sslvit.checkpoint import find_encoder, reject_overrides, split_checkpoint
from sslvit.compatibility import check_fits, load_strict
from sslvit.files import brief
from sslvit.layouts import dino, hub, mae, openai_igpt, transformers_folder, vit_mae
from sslvit.layouts.transformers_folder import is_folder, model_type
from sslvit.layouts.unwrap import unwrap
from sslvit.models.dino import DINOModel
from sslvit.models.igpt import IGPTModel
from sslvit.models.mae import MAEModel
from sslvit.settings import DINOSettings, EncoderSettings, IGPTSettings, MAESettings
from sslvit.settings.load import build
from sslvit.sharded_checkpoint import read_checkpoint
from sslvit.weight_files import read_folder_weights, read_torch_file

logger = logging.getLogger(__name__)


class HeadsNotStated(ValueError):
    """Neither the file nor the caller states the number of attention heads."""


def load_mae(
    source: str | Path, heads: int | None = None, decoder_heads: int | None = None, **settings: Any
) -> MAEModel:
    """Load MAE with its decoder from a run, a folder of transformers, or a released file.

    Args:
        source: A run folder of MAE or its checkpoint, a folder of transformers' ViTMAEForPreTraining, or a released
            file that includes the decoder (mae_pretrain_vit_..._full.pth).
        heads: Attention heads of the encoder, for a released file, which does not state them.
        decoder_heads: Attention heads of the decoder, likewise.
        settings: Other fields of MAESettings, which override those of the source.

    Raises:
        FileNotFoundError: The source does not exist.
        ValueError: The source has no decoder, or heads are given although it states them, or missing although it does
            not.
    """
    path = find_encoder(source, by_network=True)
    given = {"heads": heads, "decoder_heads": decoder_heads}
    if is_folder(path):
        reject_overrides(str(path), {key: value for key, value in given.items() if value})
        return _mae_from_transformers(path, settings)
    if path.is_dir():
        raise ValueError(f"{path}: holds an encoder alone, without MAE's decoder. Give the run or its checkpoint.")
    content = read_checkpoint(path)
    if "sslvit" in content:
        reject_overrides(str(path), {key: value for key, value in given.items() if value})
        return _mae_from_run(content, path, settings)
    if heads is None or decoder_heads is None:
        missing = " and ".join(key for key, value in given.items() if value is None)
        raise HeadsNotStated(f"{path}: a released file does not state its {missing}. Give them (12 and 16 for ViT-B).")
    return mae_from_state(unwrap(content, str(path)).everything, heads, decoder_heads, **settings)


def mae_from_state(state: dict[str, Tensor], heads: int, decoder_heads: int, **settings: Any) -> MAEModel:
    """`load_mae`, for the state dict of a released file in memory."""
    converted = mae.to_sslvit(state, heads)
    stated = mae.decoder_shape(converted.extras) | {"decoder_heads": decoder_heads}
    return _mae(converted.settings, converted.encoder, converted.extras, stated | settings, "MAE")


def _mae_from_transformers(path: Path, settings: dict[str, Any]) -> MAEModel:
    """Load a ViTMAEForPreTraining from its folder."""
    if (kind := model_type(path)) != "vit_mae":
        raise ValueError(f"{path}: a {brief(kind)}, which has no decoder of MAE. Give a ViTMAEForPreTraining.")
    state = unwrap(read_folder_weights(path), str(path)).everything
    converted = transformers_folder.to_sslvit(state, path)
    stated, decoder = transformers_folder.mae_decoder(path, converted.extras)
    return _mae(converted.settings, converted.encoder, decoder, stated | settings, str(path))


def decoder_beside(source: str | Path) -> tuple[MAESettings, dict[str, Tensor]] | None:
    """Settings and weights of the decoder in a folder of transformers' ViTMAEForPreTraining; None for other sources.

    A released file of MAE has a decoder too, but does not state its heads or its target.
    """
    path = find_encoder(source) if hub.is_name(source) or Path(source).exists() else Path(source)
    if not is_folder(path) or model_type(path) != "vit_mae":
        return None
    extras = transformers_folder.to_sslvit(unwrap(read_folder_weights(path), str(path)).everything, path).extras
    if not vit_mae.has_decoder(set(extras)):
        return None
    stated, decoder = transformers_folder.mae_decoder(path, extras)
    return _mae_settings(stated, str(path)), decoder


def _mae_from_run(content: dict[str, Any], path: Path, settings: dict[str, Any]) -> MAEModel:
    """Load the model of an MAE run from its checkpoint."""
    encoder_settings, encoder, others = split_checkpoint(content, path)
    parameters = content.get("hyper_parameters")
    stated = parameters.get("task") if isinstance(parameters, dict) else None
    decoder = {key: value for key, value in others.items() if key.startswith("decoder.")}
    if not isinstance(stated, dict) or stated.get("name") != "mae" or not decoder:
        raise ValueError(f"{path}: no run of MAE, which has a decoder. Give one, such as --config mae/digits trains.")
    return _mae(encoder_settings, encoder, decoder, stated | settings, str(path))


def _mae_settings(stated: dict[str, Any], source: str) -> MAESettings:
    try:
        return build(MAESettings, stated)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _mae(
    encoder_settings: EncoderSettings, encoder: dict[str, Tensor], decoder: dict[str, Tensor], stated: dict[str, Any],
    source: str,
) -> MAEModel:  # fmt: skip
    """Make a model with these weights; their shapes are compared with the settings before memory is allocated."""
    check_fits(encoder_settings, encoder, source)
    settings = _mae_settings(stated, source)
    for key, value in mae.decoder_shape(decoder).items():
        ratio = settings.decoder_mlp_ratio or encoder_settings.mlp_ratio
        here = ratio if key == "decoder_mlp_ratio" else getattr(settings, key)
        if round(here * settings.decoder_width) != round(value * settings.decoder_width):
            raise ValueError(f"{source}: states {key} {brief(here)}, and its weights have {brief(value)}.")
    model = MAEModel(settings, encoder_settings)
    load_strict(model, {f"encoder.{key}": value for key, value in encoder.items()} | decoder, source)
    return model.eval()


def mae_to_state(model: MAEModel) -> dict[str, Tensor]:
    """The model's weights under the names of the released checkpoints."""
    weights = model.state_dict()
    extras = {key: value for key, value in weights.items() if key.startswith("decoder.")}
    encoder = {key.removeprefix("encoder."): weights[key] for key in weights if key not in extras}
    return mae.from_sslvit(encoder, extras)


def load_dino(path: str | Path, heads: int, **settings: Any) -> DINOModel:
    """Load DINO's released full checkpoint: student, teacher and their heads.

    Args:
        path: A file that contains both networks (..._full_checkpoint.pth).
        heads: Attention heads of the encoder, which the file does not state.
        settings: Other fields of DINOSettings.

    Raises:
        ValueError: The file does not contain both networks with their heads.
    """
    content = read_torch_file(Path(path))
    if not {"student", "teacher"} <= content.keys():
        raise ValueError(f"{path}: holds no student and teacher; load_dino needs a full checkpoint.")
    model = dino_from_state(content["student"], content["teacher"], heads, **settings)
    if "dino_loss" in content:
        model.center.copy_(content["dino_loss"]["center"].flatten())
    return model


def dino_from_state(student: dict[str, Tensor], teacher: dict[str, Tensor], heads: int, **settings: Any) -> DINOModel:
    """`load_dino`, for state dicts in memory."""
    converted = {"student": dino.to_sslvit(student, heads), "teacher": dino.to_sslvit(teacher, heads)}
    shape = dino.head_shape(converted["student"].extras)
    model = DINOModel(DINOSettings(**{**shape, **settings}).fitted(1, 256, 1), converted["student"].settings)
    networks = {"student": (model.encoder, model.head), "teacher": (model.teacher, model.teacher_head)}
    for name, (encoder, head) in networks.items():
        encoder.load_state_dict(converted[name].encoder)
        head.load_state_dict({key.removeprefix("head."): value for key, value in converted[name].extras.items()})
    return model


def load_igpt(source: str | Path, heads: int | None = None, **changes: Any) -> IGPTModel:
    """Load a model of pixels with its output matrix from a run folder, its checkpoint, or a released file.

    Args:
        source: A folder or a file: transformers' weights, or the TensorFlow variables as arrays (.npz).
        heads: Attention heads of a released file; None to look them up by the released sizes.
        changes: Settings that a released file does not state; `palette` is required.

    Raises:
        FileNotFoundError: The source does not exist.
        ValueError: The model does not predict the next pixel, or the palette of a released file is missing.
    """
    path = zoo.find(str(source)) if zoo.is_name(source) else Path(source)
    if path.is_dir():
        path = path / "checkpoints" / "last.ckpt"
        if not path.exists():
            raise FileNotFoundError(
                f"{source}: no checkpoints/last.ckpt there. An encoder alone cannot predict pixels: "
                "give the run folder or the checkpoint."
            )
    content = read_checkpoint(path)
    if "sslvit" not in content:
        weights = unwrap(content, str(path)).everything
        if openai_igpt.recognize(set(weights)) and "palette" not in changes:
            raise ValueError(f"{source}: a released file does not hold its colors. Give --palette FILE (or uniform).")
        return igpt_from_state(weights, heads, **changes)
    if changes or heads:
        given = ", ".join(["heads"] * bool(heads) + list(changes))
        raise ValueError(
            f"{source}: this run already stores its settings; remove {given}, which are for released files."
        )
    settings, encoder, others = split_checkpoint(content, path)
    if settings.tokens != "pixel" or not settings.causal or "head.weight" not in others:
        raise ValueError(
            f"{source}: does not predict the next pixel, which sampling and likelihoods need. Give a run of iGPT, such "
            "as sslvit pretrain --config igpt/digits trains."
        )
    return _igpt(settings, encoder, others["head.weight"])


def igpt_from_state(state: dict[str, Tensor], heads: int | None = None, **changes: Any) -> IGPTModel:
    """Load the released model from a state dict in memory; `changes` as for `load_igpt`."""
    if not openai_igpt.recognize(set(state)):
        raise ValueError(f"not iGPT's weights ({', '.join(sorted(state)[:3])}, ...).")
    converted = openai_igpt.to_sslvit(state, heads, **changes)
    for note in converted.notes:
        logger.info(f"iGPT: {note}")
    if "head.weight" not in converted.extras:
        raise ValueError("this checkpoint has no output matrix (lm_head.weight or wtet), so it predicts no pixels.")
    return _igpt(converted.settings, converted.encoder, converted.extras["head.weight"])


def _igpt(settings: EncoderSettings, encoder: dict[str, Tensor], head: Tensor) -> IGPTModel:
    """Make a model from a trained encoder and output matrix, in evaluation mode."""
    check_fits(settings, encoder, "iGPT")
    model = IGPTModel(IGPTSettings(), settings)
    load_strict(model.encoder, encoder, "iGPT")
    if head.shape != model.head.weight.shape:
        raise ValueError(f"iGPT: an output matrix of {tuple(head.shape)}, not {tuple(model.head.weight.shape)}.")
    model.head.load_state_dict({"weight": head})
    return model.eval()
