"""timm: a folder that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` opens.

config.json         architecture, its arguments and the preprocessing
model.safetensors   the weights, under the names they already have
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

from PIL.Image import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from sslvit.environment import require_packages
from sslvit.export.exported import Exported
from sslvit.layouts.preprocessing import resized_sides
from sslvit.layouts.timm import from_sslvit, model_arguments, resampling_differs, rows_kept
from sslvit.layouts.vit import state_with_table
from sslvit.settings import EncoderSettings

ARCHITECTURE = "vit_base_patch16_224"  # any plain ViT: the arguments below replace all that it says


def check(exported: Exported, size: str | None) -> bool:
    """Whether it will take images of one size only.

    Raises:
        ValueError: timm's plain ViT cannot hold this encoder, or not at other sizes, which are asked for.
        ImportError: timm is not installed.
    """
    arguments_of(exported)
    differs = resampling_differs(exported.settings)
    if size == "dynamic" and differs:
        raise ValueError(f"--size dynamic: timm stretches positions in another way ({differs}). Use --size fixed.")
    require_packages("--format timm", "sslvit[timm]", "timm")
    return size == "fixed" or differs is not None


def arguments_of(exported: Exported) -> dict:
    return model_arguments(
        exported.settings, exported.outputs, 0 if exported.head is None else exported.head.out_features
    )


def write(exported: Exported, folder: Path, is_fixed: bool) -> None:
    settings = exported.settings
    arguments = {**arguments_of(exported), "dynamic_img_size": not is_fixed}
    tensors = {key: value.contiguous() for key, value in tensors_of(exported).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    about = {
        "architecture": ARCHITECTURE,
        "num_classes": arguments["num_classes"],
        "num_features": settings.width,
        "global_pool": arguments["global_pool"],
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [settings.channels, *settings.image_size], "fixed_input_size": is_fixed,
            "interpolation": settings.interpolation, "crop_pct": crop_pct(settings),
            "crop_mode": settings.crop_mode, "mean": settings.mean, "std": settings.std,
            "num_classes": arguments["num_classes"], "pool_size": None, "first_conv": "patch_embed.proj",
            "classifier": "head", **({"label_names": exported.classes} if exported.classes else {}),
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(about, indent=1) + "\n")


def tensors_of(exported: Exported) -> dict[str, Tensor]:
    """All that is written, under timm's names."""
    classifier = {} if exported.head is None else {f"head.{k}": v for k, v in exported.head.state_dict().items()}
    return from_sslvit(state_with_table(exported.encoder, rows_kept(exported.settings), exported.outputs), classifier)


def crop_pct(settings: EncoderSettings) -> float:
    """The share for which timm, which cuts what it divides to whole pixels, resizes to the sides that are meant."""
    side, resized = settings.image_size[0], resized_sides(settings)[0]
    share = settings.crop_fraction if math.floor(side / settings.crop_fraction) == resized else side / resized
    while math.floor(side / share) < resized:
        share = math.nextafter(share, 0.0)
    return share


def reopen(folder: Path, exported: Exported, is_fixed: bool) -> Callable[[Tensor], Tensor]:
    return opened(folder)


def opened(folder: Path) -> nn.Module:
    """The model as timm opens it."""
    import timm

    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def weights(folder: Path, exported: Exported, is_fixed: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors as they were meant, and as timm has them."""
    return tensors_of(exported), opened(folder).state_dict()


def preprocessing(folder: Path, exported: Exported) -> Callable[[Image], Tensor]:
    """What timm does to an image on its way in."""
    import timm

    model = timm.create_model(f"local-dir:{folder}", pretrained=False)
    return timm.data.create_transform(**timm.data.resolve_model_data_config(model))


def how_to_open(exported: Exported, is_fixed: bool) -> str:
    return f"""import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
{exported.outputs} = model(transform(image)[None])"""
