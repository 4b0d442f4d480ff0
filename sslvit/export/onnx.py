"""ONNX: one file, model.onnx, with the input `images` and an output named after what it is.

The batch is dynamic; height and width are those of training, or, with --size dynamic, any that the patch divides.
Weights of more than 1.5 GB lie in model.onnx.data beside it.
"""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sslvit.export import torch as program
from sslvit.export.exported import Exported

FILE = "model.onnx"
OPSET = 18
MOST_BYTES = 1_500_000_000  # in one file; protobuf ends at 2 GB


def check(exported: Exported, size: str | None) -> bool:
    """As for torch.export.

    Raises:
        ValueError: other sizes are asked for, and ONNX cannot stretch these positions.
        ImportError: onnx, onnxscript or onnxruntime is not installed.
    """
    is_fixed = program.check(exported, size)
    if not is_fixed and exported.settings.positions == "relative_bias":
        raise ValueError("--size dynamic: ONNX cannot stretch positions: relative_bias. Use --size fixed.")
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"--format onnx: {error.name} is not installed. Run: pip install 'sslvit[onnx]'") from error
    return is_fixed


def write(exported: Exported, folder: Path, is_fixed: bool) -> None:
    settings = exported.settings
    size = sum(value.numel() * value.element_size() for value in exported.state_dict().values())
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        made = torch.onnx.export(
            program.trace(exported, is_fixed), (), dynamo=True, opset_version=OPSET, input_names=["images"],
            output_names=[exported.outputs], verbose=False,
        )  # fmt: skip
    about = {
        "size": settings.image_size, "mean": settings.mean, "std": settings.std,
        "interpolation": settings.interpolation, "classes": exported.classes,
    }  # fmt: skip
    made.model.metadata_props["preprocessing"] = json.dumps(about)
    made.save(folder / FILE, external_data=size > MOST_BYTES)


def reopen(folder: Path, exported: Exported, is_fixed: bool) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / FILE, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def how_to_open(exported: Exported, is_fixed: bool) -> str:
    return f"""import onnxruntime

session = onnxruntime.InferenceSession("FOLDER/{FILE}")
({exported.outputs},) = session.run(None, {{"images": images}})  # float32 'b c h w', prepared as above"""
