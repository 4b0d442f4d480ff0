"""transformers: a folder for ``from_pretrained``, as ViT, Dinov2, DINOv3ViT, ImageGPT or another of its models.

config.json                 the model and its settings
model.safetensors           the weights under transformers' names
preprocessor_config.json    the preprocessing
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL.Image import Image
from torch import Tensor

from sslvit.environment import require_packages
from sslvit.exporters import plain_vit, transformers_kinds
from sslvit.exporters.cropping import (
    IMAGE_CHANNELS,
    fit,
    fit_snippet,
    is_fitted,
    open_snippet,
    resized_sides,
    zeros_snippet,
)
from sslvit.exporters.exported import Exported, Reopened, masking_noise, save_tensors
from sslvit.layouts import openai_igpt, transformers_folder, vit_mae
from sslvit.layouts.transformers import with_neutral
from sslvit.settings import EncoderSettings
from sslvit.settings.palette import UNIFORM

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CLASSES = {"vit": "ViT", "dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters", "dinov3_vit": "DINOv3ViT",
           "imagegpt": "ImageGPT"}  # fmt: skip
CLASSES |= transformers_kinds.CLASSES
ENDINGS = {"logits": "ForImageClassification", "reconstruction": "ForPreTraining"}  # of class names; else Model
LOADERS = {"logits": "AutoModelForImageClassification", "reconstruction": "ViTMAEForPreTraining"}  # else AutoModel
RESAMPLE = {"bilinear": 2, "bicubic": 3}  # PIL's numbers


def check(exported: Exported, size: str | None) -> bool:
    """Whether the export takes images of one size only; refuses encoders that no model of transformers supports."""
    settings, outputs = exported.settings, exported.outputs
    model_arguments(settings, outputs)
    if settings.tokens == "pixel" and outputs == "logits":
        raise ValueError("--outputs logits: transformers' ImageGPT has another classifier. Use features.")
    if plain_vit.is_dinov3(settings) and outputs == "logits":
        raise ValueError("--outputs logits: transformers' DINOv3ViT has no classifier. Use features, or --format timm.")
    is_fixed = plain_vit.is_fixed_size("transformers", size, _size_difference(settings, outputs))
    require_packages("--format transformers", "sslvit[transformers]", "transformers")
    return is_fixed


def model_type(settings: EncoderSettings, outputs: str) -> str:
    """The model_type of the model in transformers that supports these settings or comes nearest."""
    if settings.tokens == "pixel":
        return "imagegpt"
    if outputs == "reconstruction":
        return "vit_mae"
    if plain_vit.is_dinov3(settings):
        return "dinov3_vit"
    is_dinov2 = settings.layer_scale is not None or settings.mlp == "swiglu"
    if settings.tokens == "patch" and not is_dinov2:
        if settings.pre_norm or not settings.patch_bias:
            return "clip_vision_model"
        if not settings.class_token and not settings.registers:
            is_siglip = settings.pooling == "attention" or settings.mlp == "gelu_tanh"
            return "siglip_vision_model" if is_siglip else "ijepa"
        if settings.class_token and settings.registers == 1 and settings.prefix_positions == "all":
            return "deit"
    if settings.registers:
        return "dinov2_with_registers"
    # Dinov2's classifier also reads the mean over patches, unlike ViT's
    is_mean = outputs == "logits" and settings.pooling == "mean"
    return "dinov2" if is_dinov2 or is_mean else "vit"


def model_arguments(settings: EncoderSettings, outputs: str = "features") -> dict[str, Any]:
    """Arguments of transformers' config for these settings; refuses all options that its model does not support."""
    kind = model_type(settings, outputs)
    if kind == "imagegpt":
        return _imagegpt_arguments(settings, outputs)
    return transformers_kinds.arguments(kind, settings, outputs)


def _imagegpt_arguments(settings: EncoderSettings, outputs: str) -> dict[str, Any]:
    is_pooled, (height, width) = outputs != "tokens", settings.size
    plain_vit.refuse_options("transformers' imagegpt", {
        "causal: false": not settings.causal,
        f"channels: {settings.channels}": settings.channels != 3,
        f"norm: {settings.norm}": settings.norm != "rms",
        f"mlp: {settings.mlp}": settings.mlp != "quick_gelu",
        f"pos_embed: {settings.pos_embed}": settings.pos_embed not in ("learned_1d", "sincos_1d", "sincos_2d"),
        "locality_self_attention: true": settings.locality_self_attention,
        "qk_norm: true": settings.qk_norm,
        f"layer_scale: {settings.layer_scale}": settings.layer_scale is not None,
        "pre_norm: true": settings.pre_norm,
        "final_norm: false": not settings.final_norm,
        "fc_norm: true": settings.fc_norm and is_pooled,
        "pooling: attention": settings.pooling == "attention" and is_pooled,
        "mask_token: true": settings.mask_token,
        f"image_size: {settings.image_size}, which is no square": height != width,
    })  # fmt: skip
    return {
        "vocab_size": (512 if settings.palette == UNIFORM else len(settings.palette)) + 1,
        "n_positions": settings.grid[0] * settings.grid[1], "n_embd": settings.width, "n_layer": settings.depth,
        "n_head": settings.heads, "n_inner": settings.mlp_width, "layer_norm_epsilon": settings.norm_eps,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    }  # fmt: skip


def _size_difference(settings: EncoderSettings, outputs: str) -> str | None:
    """The reason why transformers' positions differ at other sizes, or None."""
    kind = model_type(settings, outputs)
    if kind == "imagegpt":
        return "a pixel sequence is tied to its size"
    if kind == "dinov3_vit":
        return None  # its positions work for any size
    if kind == "vit_mae":
        return "its decoder's table as one row"
    if settings.size[0] != settings.size[1]:
        return f"image_size: {settings.image_size}, which is no square"
    return plain_vit.resampling_difference(settings, antialias=kind == "dinov2_with_registers")


def write(exported: Exported, folder: Path, is_fixed: bool) -> None:
    """Write config.json, model.safetensors and preprocessor_config.json."""
    import transformers

    settings, outputs = exported.settings, exported.outputs
    kind = model_type(settings, outputs)
    names = dict(enumerate(exported.classes))
    labels: dict[str, Any] = {}
    if names:
        labels = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    elif exported.head is not None:
        labels = {"num_labels": exported.head.out_features}
    decoder = transformers_kinds.decoder_arguments(exported) if kind == "vit_mae" else {}
    config = getattr(transformers, f"{CLASSES[kind]}Config")(**model_arguments(settings, outputs), **labels, **decoder)
    config.architectures = [f"{CLASSES[kind]}{ENDINGS.get(outputs, 'Model')}"]
    config.save_pretrained(folder)
    if kind == "imagegpt":
        tensors = openai_igpt.from_sslvit(exported.encoder.state_dict(), {})
    else:
        tensors = transformers_kinds.tensors_of(kind, exported)
    if exported.head is not None:
        tensors = {f"{kind}.{key}": value for key, value in tensors.items()}
        tensors |= classifier(exported.head.state_dict(), kind, settings.pooling)
    save_tensors(tensors, folder)
    make_processor(exported).save_pretrained(folder)


def classifier(head: dict[str, Tensor], kind: str, pooling: str) -> dict[str, Tensor]:
    """A classifier under transformers' names. Dinov2's also reads the mean over patches."""
    weight = head["weight"]
    if kind.startswith("dinov2"):
        nothing = torch.zeros_like(weight)
        weight = torch.cat([weight, nothing] if pooling == "class" else [nothing, weight], 1)
    return {"classifier.weight": weight, "classifier.bias": head["bias"]}


def make_processor(exported: Exported) -> Any:
    """The image processor equivalent to sslvit's preprocessing, given cropped and resized images if `is_fitted`."""
    import transformers

    settings = exported.settings
    height, width = settings.size
    crop = {"height": height, "width": width}
    common: dict[str, Any] = {
        "resample": RESAMPLE[settings.interpolation], "image_mean": settings.mean, "image_std": settings.std,
    }  # fmt: skip
    if settings.tokens == "pixel":
        common |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # palettes are in [-1, 1]
        return transformers.ImageGPTImageProcessor(exported.encoder.pixel_tokens.palette.tolist(), size=crop, **common)
    common["do_convert_rgb"] = settings.channels == 3
    if is_fitted(settings):
        return transformers.ViTImageProcessor(do_resize=False, **common)
    rows, columns = resized_sides(settings)
    size = {"height": rows, "width": columns} if settings.crop_mode == "squash" else {"shortest_edge": rows}
    if size == crop:
        return transformers.ViTImageProcessor(size=size, **common)
    return transformers.BitImageProcessor(size=size, crop_size=crop, **common)


def has_unused_pooler(exported: Exported) -> bool:
    """Whether the model has an untrained pooler by default, which must be disabled."""
    kind = model_type(exported.settings, exported.outputs)
    return exported.outputs not in LOADERS and kind in ("vit", "ijepa", "deit")


def resamples_on_request(kind: str) -> bool:
    """Whether a model requires `interpolate_pos_encoding` to take images of other sizes."""
    return kind == "vit" or kind in transformers_kinds.CLASSES


def open_model(folder: Path, exported: Exported) -> PreTrainedModel:
    """Load the model in transformers."""
    import transformers

    loader = getattr(transformers, LOADERS.get(exported.outputs, "AutoModel"))
    more = {"add_pooling_layer": False} if has_unused_pooler(exported) else {}
    return loader.from_pretrained(folder, **more).eval()


def reopen(folder: Path, exported: Exported) -> Reopened:
    """The model in transformers, with the pooling in the code of `usage`."""
    settings, outputs = exported.settings, exported.outputs
    model, kind = open_model(folder, exported), model_type(exported.settings, exported.outputs)

    def run_pixels(images: Tensor) -> Tensor:
        indices = exported.encoder.pixel_tokens.quantize(images)
        start = torch.full((len(indices), 1), model.config.vocab_size - 1)
        found = model(input_ids=torch.cat([start, indices[:, :-1]], 1), output_hidden_states=True)
        tokens = found.last_hidden_state
        if outputs == "tokens":
            return tokens
        if (layer := settings.probed_layer) < settings.depth:
            norm = model.get_submodule(f"h.{layer}.ln_1" if settings.feature_norm == "next" else "ln_f")
            tokens = norm(found.hidden_states[layer])
        return tokens.mean(1)

    def run(images: Tensor) -> Tensor:
        if outputs == "reconstruction":
            grid = settings.grid_of(*images.shape[2:])
            return model(pixel_values=images, noise=masking_noise(len(images), grid[0] * grid[1])).logits
        is_resampled = resamples_on_request(kind) and tuple(images.shape[2:]) != settings.size
        found = model(pixel_values=images, **({"interpolate_pos_encoding": True} if is_resampled else {}))
        if outputs == "logits":
            return found.logits
        tokens = found.last_hidden_state
        if kind == "clip_vision_model":
            tokens = model.get_submodule("post_layernorm")(tokens)
        if outputs == "tokens":
            return tokens
        if settings.pooling == "attention":
            return found.pooler_output
        return tokens[:, 0] if settings.pooling == "class" else tokens[:, settings.prefix :].mean(1)

    return run_pixels if settings.tokens == "pixel" else run


def weights(folder: Path, exported: Exported) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Expected tensors, and the tensors in transformers' model, both under the encoder's names.

    Neutral tensors that only one of them has (a LayerScale of one, a bias or a mask token of zero) are in both.
    """
    settings, outputs = exported.settings, exported.outputs
    kind = model_type(settings, outputs)
    converted = transformers_folder.to_sslvit(open_model(folder, exported).state_dict(), folder)
    found, others = converted.encoder, converted.extras
    if kind == "imagegpt":
        unused = ("patch_embed.palette", "fc_norm.", "attn_pool.")  # of pooling, which tokens do not go through
        expected = {key: value for key, value in exported.encoder.state_dict().items() if not key.startswith(unused)}
        neutral = {key: torch.zeros_like(value) for key, value in found.items() if key.endswith(".bias")}
        return neutral | expected, found
    expected = plain_vit.state_with_table(exported.encoder, transformers_kinds.position_rows(kind), outputs)
    if kind.startswith("dino"):
        expected = with_neutral(expected)
    else:
        expected.pop("mask_token", None)
    if kind == "vit_mae":
        expected |= transformers_kinds.decoder_state(exported)
        found |= vit_mae.decoder_to_sslvit(others)
    if exported.head is not None:
        expected |= classifier(exported.head.state_dict(), kind, settings.pooling)
        found |= {key: others.get(key, torch.empty(0)) for key in ("classifier.weight", "classifier.bias")}
    return expected, found


def preprocessing(folder: Path, exported: Exported) -> Callable[[Image], Tensor]:
    """transformers' preprocessing of an image; for ImageGPT, the colors of the palette indices."""
    import transformers

    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    settings = exported.settings

    def prepare(image: Image) -> Tensor:
        found = processor(fit(image, settings) if is_fitted(settings) else image, return_tensors="pt")
        if settings.tokens == "pixel":
            return exported.encoder.pixel_tokens.images_of(found["input_ids"], settings.size)[0]
        return found["pixel_values"][0]

    return prepare


def usage(exported: Exported, is_fixed: bool) -> str:
    """Lines of Python that load and run the export."""
    settings, outputs = exported.settings, exported.outputs
    kind, is_pooled_there = model_type(settings, outputs), outputs == "features" and settings.pooling == "attention"
    auto = LOADERS.get(outputs, "AutoModel")
    more = ", add_pooling_layer=False" if has_unused_pooler(exported) else ""
    is_photo = settings.channels in IMAGE_CHANNELS
    lines = [
        *(["import torch"] if settings.tokens == "pixel" or not is_photo else []),
        *(["from PIL import Image, ImageOps"] if is_photo else []),
        f"from transformers import {'AutoImageProcessor, ' if is_photo else ''}{auto}", "",
        *(['processor = AutoImageProcessor.from_pretrained(".")'] if is_photo else []),
        f'model = {auto}.from_pretrained("."{more}).eval()',
        open_snippet(settings) if is_photo else f"pixels = {zeros_snippet(settings)}",
    ]  # fmt: skip
    if is_photo and is_fitted(settings):
        lines.append(f"{fit_snippet(settings)}  # the processor would squash it")
    if settings.tokens == "pixel":
        lines += [
            'indices = processor(image, return_tensors="pt")["input_ids"]',
            "start = torch.full((len(indices), 1), model.config.vocab_size - 1)",
            "found = model(input_ids=torch.cat([start, indices[:, :-1]], 1), output_hidden_states=True)",
        ]
        layer = settings.feature_layer or settings.depth
        if outputs == "tokens" or layer == settings.depth:
            lines.append("tokens = found.last_hidden_state")
        else:
            norm = f"h[{layer}].ln_1" if settings.feature_norm == "next" else "ln_f"
            lines.append(f"tokens = model.{norm}(found.hidden_states[{layer}])")
    else:
        size = ", interpolate_pos_encoding=True" if resamples_on_request(kind) and not is_fixed else ""
        lines += ['pixels = processor(image, return_tensors="pt")["pixel_values"]'] if is_photo else []
        if outputs in LOADERS:
            lines.append(f"{outputs} = model(pixels{size}).logits")
        elif is_pooled_there:
            lines.append(f"features = model(pixels{size}).pooler_output")
        elif kind == "clip_vision_model":
            lines.append(f"tokens = model.post_layernorm(model(pixels{size}).last_hidden_state)")
        else:
            lines.append(f"tokens = model(pixels{size}).last_hidden_state")
    if outputs == "features" and not is_pooled_there:
        prefix = settings.prefix
        lines.append(
            "features = tokens[:, 0]" if settings.pooling == "class" else f"features = tokens[:, {prefix}:].mean(1)"
        )
    return "\n".join(lines)
