"""ONNX: one file, model.onnx, with the input `images` and an output named after its kind (such as features).

The batch size is dynamic; height and width are those of training, or, with --size dynamic, any multiples of the patch.
Weights of more than 1.5 GB are stored in model.onnx.data beside it.
"""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sslvit.environment import require_packages
from sslvit.exporters import torch as program
from sslvit.exporters.cropping import array_snippet
from sslvit.exporters.exported import Exported, Reopened
from sslvit.settings.encoder import crop_words

FILE = "model.onnx"
OPSET = 18
KERNEL_DIMS = 4  # dimensions of a convolution's kernel
MAX_FILE_BYTES = 1_500_000_000  # the limit of protobuf is 2 GB


def check(exported: Exported, size: str | None) -> bool:
    """Whether the export takes images of one size only, as for torch.export."""
    is_fixed = program.check(exported, size)
    if not is_fixed and exported.settings.pos_embed == "relative_bias":
        raise ValueError("--size dynamic: ONNX cannot resample pos_embed: relative_bias. Use --size fixed.")
    require_packages("--format onnx", "sslvit[onnx]", "onnx", "onnxruntime", "onnxscript")
    return is_fixed


def write(exported: Exported, folder: Path, is_fixed: bool) -> None:
    """Write model.onnx, with the preprocessing in its metadata."""
    settings = exported.settings
    size = sum(value.numel() * value.element_size() for value in exported.state_dict().values())
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        converted = torch.onnx.export(
            program.trace(exported, is_fixed), (), dynamo=True, opset_version=OPSET, input_names=["images"],
            output_names=[exported.outputs], verbose=False,
        )  # fmt: skip
    assert converted is not None  # as no file is given
    preprocessing = {
        "size": settings.image_size, "mean": settings.mean, "std": settings.std,
        "interpolation": settings.interpolation, "crop_mode": settings.crop_mode,
        "crop_fraction": settings.crop_fraction,
        "crop": crop_words(settings.crop_mode, settings.crop_fraction, list(settings.size)),
        "classes": exported.classes,
    }  # fmt: skip
    converted.model.metadata_props["preprocessing"] = json.dumps(preprocessing)
    converted.save(folder / FILE, external_data=size > MAX_FILE_BYTES)


def reopen(folder: Path, exported: Exported, replacements: dict[str, Any] | None = None) -> Reopened:
    """The program in ONNX Runtime, optionally with some tensors replaced."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    for name, value in (replacements or {}).items():
        options.add_initializer(name, value)
    session = onnxruntime.InferenceSession(folder / FILE, options, providers=["CPUExecutionProvider"])
    session.replacements = replacements  # the session does not copy them
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def reopen_with_unit_scale(folder: Path, exported: Exported) -> Reopened:
    """The program with every LayerScale set to one, so that every block affects the outputs."""
    import onnxruntime

    ones = {name: onnxruntime.OrtValue.ortvalue_from_numpy(np.ones(len(value), np.float32))
            for name, value in layer_scales(exported).items()}  # fmt: skip
    return reopen(folder, exported, ones)


def weights(folder: Path, exported: Exported) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Expected tensors, and the tensors in the file, for all that have kept their names.

    The exporter transposes matrices, folds sums of constants, and merges convolutions with the following batch norms.
    These tensors have other names or values, and are verified through the outputs (`reopen_with_unit_scale`).
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(folder / FILE).graph
    state = exported.state_dict()
    found = {
        value.name: torch.from_numpy(numpy_helper.to_array(value).copy())
        for value in graph.initializer if value.name in state and len(value.dims) < KERNEL_DIMS
    }  # fmt: skip
    scales = layer_scales(exported)
    for key in scales.keys() - found.keys():  # equal tensors are stored once, under one of their names
        equal = [value for value in found.values() if torch.equal(value, scales[key])]
        if equal:
            found[key] = equal[0]
    return {key: state[key] for key in found.keys() | scales.keys()}, found


def layer_scales(exported: Exported) -> dict[str, Tensor]:
    """The LayerScales of all branches that affect the outputs, by their names in the program."""
    settings = exported.settings
    layer = settings.feature_layer if exported.outputs == "features" else None
    return {
        key: value for key, value in exported.state_dict().items()
        if key.endswith(".gamma") and int(key.split(".")[2]) < (layer or settings.depth)
    }  # fmt: skip


def usage(exported: Exported, is_fixed: bool) -> str:
    """Lines of Python that load and run the export."""
    lines = [
        "import numpy as np", "import onnxruntime", "from PIL import Image, ImageOps", "",
        f'session = onnxruntime.InferenceSession("{FILE}")', *array_snippet(exported.settings),
        f'({exported.outputs},) = session.run(None, {{"images": images}})',
    ]  # fmt: skip
    return "\n".join(lines)
