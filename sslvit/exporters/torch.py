"""torch.export: one file, model.pt2, that runs without sslvit.

The batch size is dynamic; height and width are those of training, or, with --size dynamic, any multiples of the patch.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from sslvit.exporters.cropping import array_snippet
from sslvit.exporters.exported import Exported, Reopened

FILE = "model.pt2"
MAX_PATCHES = 4096  # rows or columns of dynamic sizes


def check(exported: Exported, size: str | None) -> bool:
    """Whether the export takes images of one size only; refuses a dynamic size if tracing does not support it."""
    settings = exported.settings
    if size != "dynamic":
        return True
    for option, applies in (
        ("tokens: pixel", settings.tokens == "pixel"),
        ("one row or column of patches", min(settings.grid) == 1),
        (f"interpolate_offset: {settings.interpolate_offset:g}", settings.interpolate_offset != 0),
    ):
        if applies:
            raise ValueError(f"--size dynamic: not in one program with {option}. Use --size fixed.")
    return False


def trace(exported: Exported, is_fixed: bool) -> ExportedProgram:
    """The traced program: images 'b c h w' -> outputs."""
    settings = exported.settings
    shapes: dict[int, Dim] = {0: Dim("batch", min=1, max=65_536)}
    if not is_fixed:
        for axis, name in ((2, "rows"), (3, "columns")):
            shapes[axis] = settings.patch * Dim(name, min=2, max=MAX_PATCHES)
    # two images, and two patches more than in training, so that tracing does not specialize on these sizes
    height, width = settings.size if is_fixed else [side + 2 * settings.patch for side in settings.size]
    images = torch.randn(2, settings.channels, height, width)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(exported, (images,), dynamic_shapes=(shapes,), strict=False)


def write(exported: Exported, folder: Path, is_fixed: bool) -> None:
    """Write model.pt2."""
    content = io.BytesIO()  # on a full disk, torch's file writer ends the process, in a destructor
    torch.export.save(trace(exported, is_fixed), content)
    (folder / FILE).write_bytes(content.getbuffer())


def reopen(folder: Path, exported: Exported) -> Reopened:
    """Load the program in torch."""
    return torch.export.load(folder / FILE).module()


def weights(folder: Path, exported: Exported) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Expected tensors, and the tensors in the program."""
    program = torch.export.load(folder / FILE)
    constants = {key: value for key, value in program.constants.items() if isinstance(value, Tensor)}
    buffers = {key: value for key, value in exported.named_buffers() if key in constants}
    return exported.state_dict() | buffers, dict(program.state_dict) | {key: constants[key] for key in buffers}


def usage(exported: Exported, is_fixed: bool) -> str:
    """Lines of Python that load and run the export."""
    lines = [
        "import numpy as np", "import torch", "from PIL import Image, ImageOps", "",
        f'model = torch.export.load("{FILE}").module()', *array_snippet(exported.settings),
        f"{exported.outputs} = model(torch.from_numpy(images))",
    ]  # fmt: skip
    return "\n".join(lines)
