"""transformers: a folder that ``from_pretrained`` opens, as ViT, Dinov2, Dinov2WithRegisters or ImageGPT.

config.json                 the model and its settings
model.safetensors           the weights under transformers' names
preprocessor_config.json    how images reach it
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import ImageOps
from PIL.Image import Image, Resampling
from safetensors.torch import save_file
from torch import Tensor, nn

from sslvit.environment import require_packages
from sslvit.export.exported import Exported
from sslvit.layouts import openai_igpt
from sslvit.layouts.preprocessing import fraction_held, resized_sides
from sslvit.layouts.transformers import classifier, from_sslvit, kind_of, model_arguments, rename, resampling_differs
from sslvit.layouts.vit import state_with_table
from sslvit.settings import EncoderSettings

CLASSES = {"vit": "ViT", "dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters", "imagegpt": "ImageGPT"}
RESAMPLE = {"bilinear": 2, "bicubic": 3}  # PIL's numbers


def check(exported: Exported, size: str | None) -> bool:
    """Whether it will take images of one size only.

    Raises:
        ValueError: no model of transformers holds this encoder, or not at other sizes, which are asked for.
        ImportError: transformers is not installed.
    """
    settings, outputs = exported.settings, exported.outputs
    model_arguments(settings, outputs)
    if settings.tokens == "pixel" and outputs == "logits":
        raise ValueError("--outputs logits: transformers' ImageGPT classifies otherwise. Use features.")
    differs = resampling_differs(settings, outputs)
    if size == "dynamic" and differs:
        raise ValueError(
            f"--size dynamic: transformers stretches positions in another way ({differs}). Use --size fixed."
        )
    require_packages("--format transformers", "sslvit[transformers]", "transformers")
    return size == "fixed" or differs is not None


def write(exported: Exported, folder: Path, is_fixed: bool) -> None:
    import transformers

    settings, outputs = exported.settings, exported.outputs
    kind = kind_of(settings, outputs)
    names = dict(enumerate(exported.classes))
    labels = {"id2label": names, "label2id": {name: number for number, name in names.items()}} if names else {}
    if exported.head is not None and not exported.classes:
        labels = {"num_labels": exported.head.out_features}
    config = getattr(transformers, f"{CLASSES[kind]}Config")(**model_arguments(settings, outputs), **labels)
    config.architectures = [f"{CLASSES[kind]}{'Model' if exported.head is None else 'ForImageClassification'}"]
    config.save_pretrained(folder)
    if kind == "imagegpt":
        weights = openai_igpt.from_sslvit(exported.encoder.state_dict(), {})
    else:
        weights = from_sslvit(state_with_table(exported.encoder, 1, outputs), kind)
    if exported.head is not None:
        weights = {f"{kind}.{key}": value for key, value in weights.items()}
        weights |= classifier(exported.head.state_dict(), kind, settings.pooling)
    save_file(
        {key: value.contiguous() for key, value in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    processor_of(exported).save_pretrained(folder)


def processor_of(exported: Exported) -> Any:
    """The image processor that does what sslvit does to an image, or to one that is fitted before (`is_fitted`)."""
    import transformers

    settings = exported.settings
    height, width = settings.image_size
    common = {"resample": RESAMPLE[settings.interpolation], "image_mean": settings.mean, "image_std": settings.std}
    if settings.tokens == "pixel":
        common |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # palettes are in [-1, 1]
        clusters = exported.encoder.patch_embed.palette.tolist()
        return transformers.ImageGPTImageProcessor(clusters, size={"height": height, "width": width}, **common)
    common["do_convert_rgb"] = settings.channels == 3
    if is_fitted(settings):
        return transformers.ViTImageProcessor(do_resize=False, **common)
    crop, (rows, columns) = {"height": height, "width": width}, resized_sides(settings)
    size = {"height": rows, "width": columns} if settings.crop_mode == "squash" else {"shortest_edge": rows}
    if size == crop:
        return transformers.ViTImageProcessor(size=size, **common)
    return transformers.BitImageProcessor(size=size, crop_size=crop, **common)


def opened(folder: Path, exported: Exported) -> nn.Module:
    """The model as transformers opens it."""
    import transformers

    if exported.outputs == "logits":
        return transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    more = {"add_pooling_layer": False} if kind_of(exported.settings, exported.outputs) == "vit" else {}
    return transformers.AutoModel.from_pretrained(folder, **more).eval()


def reopen(folder: Path, exported: Exported, is_fixed: bool) -> Callable[[Tensor], Tensor]:
    settings, outputs = exported.settings, exported.outputs
    model = opened(folder, exported)

    def run(images: Tensor) -> Tensor:
        if settings.tokens == "pixel":
            indices = exported.encoder.patch_embed.quantize(images)
            start = torch.full((len(indices), 1), model.config.vocab_size - 1)
            found = model(input_ids=torch.cat([start, indices[:, :-1]], 1), output_hidden_states=True)
            if outputs == "tokens":
                return found.last_hidden_state
            layer = settings.feature_layer or settings.depth
            if layer == settings.depth:
                return found.last_hidden_state.mean(1)
            norm = model.h[layer].ln_1 if settings.feature_norm == "next" else model.ln_f
            return norm(found.hidden_states[layer]).mean(1)
        is_stretched = kind_of(settings, outputs) == "vit" and list(images.shape[2:]) != settings.image_size
        found = model(pixel_values=images, **({"interpolate_pos_encoding": True} if is_stretched else {}))
        if outputs == "logits":
            return found.logits
        tokens = found.last_hidden_state
        if outputs == "tokens":
            return tokens
        return tokens[:, 0] if settings.pooling == "class" else tokens[:, settings.prefix :].mean(1)

    return run


def weights(folder: Path, exported: Exported, is_fixed: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of the encoder, and what transformers has in their place, both under the encoder's names.

    What only one of both has and is neutral (a scale of one, a bias or a mask token of zero) stands in both.
    """
    settings, outputs = exported.settings, exported.outputs
    state = opened(folder, exported).state_dict()
    kind = kind_of(settings, outputs)
    if kind == "imagegpt":
        found = openai_igpt.to_sslvit(state, settings.heads, image_size=settings.image_size, palette=settings.palette)
        expected = {key: value for key, value in exported.encoder.state_dict().items() if key != "patch_embed.palette"}
        neutral = {key: torch.zeros_like(value) for key, value in found.encoder.items() if key.endswith(".bias")}
        return neutral | expected, found.encoder
    found, others = rename(state)
    expected = state_with_table(exported.encoder, 1, outputs)
    if kind == "vit":
        expected = {key: value for key, value in expected.items() if key != "mask_token"}
    else:
        neutral = {key: torch.ones_like(value) for key, value in found.items() if ".ls" in key}
        expected = neutral | {"mask_token": torch.zeros(1, 1, settings.width)} | expected
    if exported.head is not None:
        expected |= classifier(exported.head.state_dict(), kind, settings.pooling)
        found |= {key: others.get(key, torch.empty(0)) for key in ("classifier.weight", "classifier.bias")}
    return expected, found


def preprocessing(folder: Path, exported: Exported) -> Callable[[Image], Tensor]:
    """What transformers does to an image on its way in; of ImageGPT, the colors that the indices stand for."""
    import transformers

    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    settings = exported.settings

    def prepare(image: Image) -> Tensor:
        found = processor(fitted(image, settings) if is_fitted(settings) else image, return_tensors="pt")
        if settings.tokens == "pixel":
            return exported.encoder.patch_embed.images_of(found["input_ids"], tuple(settings.image_size))[0]
        return found["pixel_values"][0]

    return prepare


def is_fitted(settings: EncoderSettings) -> bool:
    """Whether images are cropped and resized before transformers' processor, which cannot keep these proportions."""
    if settings.tokens == "pixel":
        return settings.crop_mode != "squash" or settings.crop_fraction < 1
    return settings.crop_mode != "squash" and settings.image_size[0] != settings.image_size[1]


def fitted(image: Image, settings: EncoderSettings) -> Image:
    """What evaluation sees of an image, resized."""
    height, width = settings.image_size
    cut = (1 - fraction_held(settings)) / 2
    resampling = Resampling[settings.interpolation.upper()]
    if settings.crop_mode == "squash":
        box = (cut * image.width, cut * image.height, (1 - cut) * image.width, (1 - cut) * image.height)
        return image.resize((width, height), resampling, box)
    return ImageOps.fit(image, (width, height), resampling, bleed=cut)


def fitting(settings: EncoderSettings) -> str:
    """The same as a line of Python."""
    height, width = settings.image_size
    cut = (1 - fraction_held(settings)) / 2
    resampling = f"Image.Resampling.{settings.interpolation.upper()}"
    if settings.crop_mode == "squash":
        w, h = "image.width", "image.height"
        box = f"({cut!r} * {w}, {cut!r} * {h}, {1 - cut!r} * {w}, {1 - cut!r} * {h})"
        return f"image = image.resize(({width}, {height}), {resampling}, {box})"
    bleed = f", bleed={cut!r}" if cut else ""
    return f"image = ImageOps.fit(image, ({width}, {height}), {resampling}{bleed})"


def how_to_open(exported: Exported, is_fixed: bool) -> str:
    settings, outputs = exported.settings, exported.outputs
    is_vit = kind_of(settings, outputs) == "vit"
    auto = "AutoModelForImageClassification" if outputs == "logits" else "AutoModel"
    more = ", add_pooling_layer=False" if is_vit and outputs != "logits" else ""
    lines = [
        *(["import torch"] if settings.tokens == "pixel" else []),
        *(["from PIL import Image, ImageOps"] if is_fitted(settings) else []),
        f"from transformers import AutoImageProcessor, {auto}", "",
        'processor = AutoImageProcessor.from_pretrained("FOLDER")',
        f'model = {auto}.from_pretrained("FOLDER"{more}).eval()',
    ]  # fmt: skip
    if is_fitted(settings):
        lines.append(f"{fitting(settings)}  # the processor would squash it")
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
        size = ", interpolate_pos_encoding=True" if is_vit and not is_fixed else ""
        result = "logits" if outputs == "logits" else "last_hidden_state"
        lines += [
            'pixels = processor(image, return_tensors="pt")["pixel_values"]',
            f"{'logits' if outputs == 'logits' else 'tokens'} = model(pixels{size}).{result}",
        ]
    if outputs == "features":
        prefix = settings.prefix
        lines.append(
            "features = tokens[:, 0]" if settings.pooling == "class" else f"features = tokens[:, {prefix}:].mean(1)"
        )
    return "\n".join(lines)
