"""Read palette files of sslvit, of the released iGPT and of transformers."""

from __future__ import annotations

import json
from pathlib import Path

from sslvit.files import brief, expand_path, printable

UNIFORM = "uniform"
FURTHEST = 1.01  # largest magnitude; rounding may put the mean of many ones slightly above 1


def read_palette(path: str | Path) -> list[list[float]]:
    """Read colors in [-1, 1] from a file; never runs code from the file.

    Args:
        path: A file of `sslvit palette` (.json), the released clusters of iGPT (.npy), or the
            preprocessor_config.json of transformers.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a palette.
    """
    path = Path(expand_path(path))
    if not path.is_file():
        raise FileNotFoundError(
            f"encoder.palette: {printable(path)} is not a file. "
            f"Make one with: sslvit palette SHARDS -o {printable(path)}, or use {UNIFORM}."
        )
    try:
        if path.suffix == ".npy":
            import numpy as np  # only for this kind of file

            colors = np.load(path, allow_pickle=False).tolist()
        else:
            content = json.loads(path.read_text(encoding="utf-8"))
            colors = content["colors"] if "colors" in content else content["clusters"]
        colors = [[float(value) for value in color] for color in colors]
    except Exception as error:  # for damaged files, numpy raises various errors
        raise ValueError(
            f"encoder.palette: {printable(path)} is no palette ({printable(' '.join(str(error).split()), 100)})."
        ) from error
    try:
        check_palette(colors, len(colors[0]) if colors else 0)
    except ValueError as error:
        raise ValueError(f"{error} (in {path})") from error
    return colors


def check_palette(palette: str | list[list[float]], channels: int) -> None:
    """Raise ValueError unless it is "uniform" or a list of different colors in [-1, 1], one number per channel."""
    if palette == UNIFORM:
        if channels not in (1, 3):
            raise ValueError(
                f"encoder.palette: {UNIFORM} is for 1 or 3 channels, not {channels}. "
                "Fit one: sslvit palette SHARDS -o FILE"
            )
        return
    if isinstance(palette, str):
        raise ValueError(
            f"encoder.palette: '{brief(palette)}' is neither {UNIFORM} nor a list of colors. "
            "Recipes and --encoder.palette take a file; in Python: palette=read_palette(file)."
        )
    if len(palette) < 2:
        raise ValueError(f"encoder.palette: {len(palette)} colors. A palette has two or more.")
    lengths = {len(color) for color in palette}
    if lengths != {channels}:
        raise ValueError(
            f"encoder.palette: colors of {' and '.join(map(str, sorted(lengths)[:4]))} numbers for {channels} "
            "channels. Give each color one number per channel (encoder.channels)."
        )
    if len({tuple(color) for color in palette}) < len(palette):
        raise ValueError("encoder.palette: some colors are the same, so one of them would never be seen.")
    values = [value for color in palette for value in color]
    outside = [value for value in values if not abs(value) <= FURTHEST]
    if outside:
        raise ValueError(f"encoder.palette: {outside[0]:g} is outside [-1, 1]. Bytes v become v / 127.5 - 1.")
