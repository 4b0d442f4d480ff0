"""torch.export: one file, model.pt2, that runs without sslvit.

The batch is dynamic; height and width are those of training, or, with --size dynamic, any that the patch divides.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from sslvit.export.exported import Exported

FILE = "model.pt2"
MOST_PATCHES = 4096  # rows or columns, of dynamic sizes


def check(exported: Exported, size: str | None) -> bool:
    """Whether it will take images of one size only.

    Raises:
        ValueError: other sizes are asked for, and this encoder cannot stretch its positions inside a program.
    """
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
    """The program: images 'b c h w' -> outputs."""
    settings = exported.settings
    shapes: dict[int, Dim] = {0: Dim("batch", min=1, max=65_536)}
    if not is_fixed:
        for axis, name in ((2, "rows"), (3, "columns")):
            shapes[axis] = settings.patch * Dim(name, min=2, max=MOST_PATCHES)
    # two images and two patches more than in training: a size that happens to fit must not be taken for a rule
    height, width = settings.image_size if is_fixed else [side + 2 * settings.patch for side in settings.image_size]
    images = torch.randn(2, settings.channels, height, width)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(exported, (images,), dynamic_shapes=(shapes,), strict=False)


def write(exported: Exported, folder: Path, is_fixed: bool) -> None:
    made = io.BytesIO()  # torch's writer of files ends the whole process on a full disk, in a destructor
    torch.export.save(trace(exported, is_fixed), made)
    (folder / FILE).write_bytes(made.getbuffer())


def reopen(folder: Path, exported: Exported, is_fixed: bool) -> Callable[[Tensor], Tensor]:
    return torch.export.load(folder / FILE).module()


def weights(folder: Path, exported: Exported, is_fixed: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors as they were meant, and as they stand in the program."""
    program = torch.export.load(folder / FILE)
    constants = {key: value for key, value in program.constants.items() if isinstance(value, Tensor)}
    buffers = {key: value for key, value in exported.named_buffers() if key in constants}
    return exported.state_dict() | buffers, dict(program.state_dict) | {key: constants[key] for key in buffers}


def how_to_open(exported: Exported, is_fixed: bool) -> str:
    return f"""import torch

model = torch.export.load("FOLDER/{FILE}").module()
{exported.outputs} = model(images)"""
