"""Figures as PNG files: rows of images, curves, bars."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.textpath import TextPath
from matplotlib.ticker import MaxNLocator

from sslvit.files import new_file, printable

GAP = 0.06  # inches between images, whose left edges are an inch apart
COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9"]  # as on HTML pages; colorblind-safe
FINE = 16  # smallest width in pixels at which a gap of a whole pixel is narrow enough
FONT_SIZE = 9  # of all text in figures
LINE = 0.16  # inches from one line of text to the next


class TextFigure(Figure):
    """A figure with text of one size, taken literally: "$" starts no formula, and no character causes an error.

    All figures use this class, so that it covers every text that comes from a user.
    """

    def savefig(self, *args: Any, **options: Any) -> None:
        """Write the figure, with all text taken literally."""
        for text in self.findobj(Text):
            text.set_parse_math(False)
            text.set_fontsize(FONT_SIZE)
            text.set_text("\n".join(printable(line) for line in text.get_text().split("\n")))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from")  # a name in another script is rendered as boxes
            super().savefig(*args, **options)


def add_legend(owner: Axes | Figure, artists: Mapping[str, Any], **options: Any) -> None:
    """Add a legend that includes names with a leading underscore, which matplotlib would leave out.

    Args:
        owner: Axes or figure that gets the legend.
        artists: Name -> plotted artist.
        options: Options of matplotlib's legend.
    """
    legend = owner.legend(list(artists.values()), ["name"] * len(artists), frameon=False, **options)
    for text, name in zip(legend.get_texts(), artists, strict=True):
        text.set_text(name)


def plot_images(
    path: str | Path,
    rows: list[np.ndarray],
    titles: list[str],
    title: str = "",
    captions: list[list[str]] | None = None,
) -> Path:
    """Plot rows of small images, with a title to the left of each row.

    Args:
        path: PNG to write.
        rows: Images of each row, 'b c h w' in [0, 1]; 1 channel is plotted as gray, more than 3 by the first 3.
        titles: Titles of the rows.
        title: Title of the figure.
        captions: Short text above each image; None for no captions.
    """
    columns, space = max(row.shape[0] for row in rows), 0.16 if captions else 0.0
    left = max([0.05, *(0.2 + _inches(line) for text in titles if text for line in text.split("\n"))])
    width = max(left + columns + 0.05, *(_inches(line) + 0.2 for line in title.split("\n")))
    y = 0.45 if title else 0.05
    figure = TextFigure(dpi=120)
    axes = figure.add_axes((0, 0, 1, 1))  # in inches, from the top left corner
    for r, row in enumerate(rows):
        y += space
        height = (1 - GAP) * row.shape[2] / row.shape[3]
        free = max(LINE * (titles[r].count("\n") + 1) - height, 0.0)  # beside very wide images
        y += free / 2
        strip, end = _side_by_side(row)
        axes.imshow(strip, vmin=0, vmax=1, interpolation="antialiased", extent=(left, left + end, y + height, y))
        axes.text(left - 0.08, y + height / 2, titles[r], ha="right", va="center")
        for c in range(row.shape[0] if captions else 0):
            assert captions is not None
            axes.text(left + c + (1 - GAP) / 2, y - 0.02, captions[r][c], ha="center", va="bottom")
        y += height + free / 2 + GAP
    axes.set(xlim=(0, width), ylim=(y, 0), aspect="auto")
    axes.set_axis_off()
    figure.set_size_inches(width, y)
    if title:
        figure.suptitle(title, y=1 - 0.12 / y, va="top")
    return _save(figure, path)


def _inches(line: str) -> float:
    """Width of a line of text in inches."""
    if not line.strip():
        return 0.0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        return TextPath((0, 0), printable(line).replace("$", "S"), size=FONT_SIZE).get_extents().width / 72


def _side_by_side(images: np.ndarray) -> tuple[np.ndarray, float]:
    """Join images 'b c h w' into one 'h w 3' with white gaps, one image per inch; also returns its width in inches."""
    pixels = np.asarray(images, float).transpose(0, 2, 3, 1)
    pixels = pixels[..., :3] if pixels.shape[3] >= 3 else pixels[..., :1].repeat(3, 3)
    repeats = -(-FINE // pixels.shape[2])  # next to tiny images, a gap of one pixel would be wide
    pixels = pixels.repeat(repeats, 1).repeat(repeats, 2)
    count, height, width, _ = pixels.shape
    gap = round(width * GAP / (1 - GAP))
    strip = np.ones((height, count, width + gap, 3))
    strip[:, :, :width] = pixels.transpose(1, 0, 2, 3)
    return strip.reshape(height, -1, 3)[:, :-gap].clip(0, 1), count - gap / (width + gap)


def overlay_heat(images: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Dim each image and overlay a heat map in colors from black to yellow; returns 'b 3 h w' in [0, 1].

    Args:
        images: Images 'b c h w' in [0, 1].
        heat: Maps 'b rows cols' of values >= 0; each map's largest value gets the brightest color.
    """
    large = _upsample(heat, images)
    colors = colormaps["inferno"](large / np.maximum(large.max((1, 2), keepdims=True), 1e-12))[..., :3]
    return 0.3 * images[:, :3].mean(1, keepdims=True) + 0.7 * colors.transpose(0, 3, 1, 2)


def dim_outside(images: np.ndarray, is_kept: np.ndarray) -> np.ndarray:
    """Darken images 'b c h w' outside the kept patches 'b rows cols'."""
    return images * np.where(_upsample(is_kept, images), 1.0, 0.15)[:, None]


def _upsample(maps: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Repeat each value of a map 'b rows cols' over the pixels of its patch."""
    rows, columns = (pixels // cells for pixels, cells in zip(images.shape[2:], maps.shape[1:], strict=True))
    return maps.repeat(rows, 1).repeat(columns, 2)


def plot_curves(
    path: str | Path, lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], x_label: str, y_label: str,
    title: str = "", mark: tuple[float, str] | None = None,
) -> Path:  # fmt: skip
    """Plot one line per entry, name -> (x, y); `mark` is an x position and its name, drawn as a dashed line."""
    figure = TextFigure(figsize=(6, 3.4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    artists: dict[str, Artist] = {}
    for (name, (x, y)), color in zip(lines.items(), COLORS * len(lines), strict=False):
        (artists[name],) = axes.plot(x, y, color=color, linewidth=1.4, marker="." if len(x) < 20 else None)
    if mark is not None:
        artists[mark[1]] = axes.axvline(mark[0], color="0.5", linewidth=1, linestyle="--")
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))  # steps, blocks
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if len(artists) > 1:
        add_legend(axes, artists)
    return _save(figure, path)


def plot_bars(
    path: str | Path, groups: Mapping[str, Mapping[str, float]], y_label: str, title: str = "",
    halves: Mapping[str, Mapping[str, float | None]] | None = None,
) -> Path:  # fmt: skip
    """Plot grouped bars, group -> name -> height, each labeled with its height; a missing bar leaves a gap.

    Args:
        path: PNG to write.
        groups: Heights of the bars.
        y_label: Label of the y axis.
        title: Title of the figure.
        halves: Half the width of each bar's interval, if it has one.
    """
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    figure = TextFigure(figsize=(max(6.4, 1.1 * len(groups)), 3.4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(names)
    artists: dict[str, BarContainer] = {}
    for i, name in enumerate(names):
        positions = np.arange(len(groups)) + (i - (len(names) - 1) / 2) * width
        heights = [group.get(name, np.nan) for group in groups.values()]
        artists[name] = axes.bar(positions, heights, width * 0.92, color=COLORS[i % len(COLORS)])
        errors = [((halves or {}).get(group) or {}).get(name) or np.nan for group in groups]
        if np.isfinite(errors).any():
            axes.errorbar(positions, heights, errors, fmt="none", ecolor="0.25", elinewidth=1, capsize=2)
        for x, height, error in zip(positions, heights, errors, strict=True):
            if np.isfinite(height):
                axes.text(x, height + (error if np.isfinite(error) else 0.0), f"{height:.0f}", ha="center", va="bottom")
    axes.set_xticks(range(len(groups)), [textwrap.fill(printable(group), 13) for group in groups])
    axes.set_ylabel(y_label)
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    columns = int((figure.get_figwidth() - 0.3) / (max(map(_inches, names)) + 0.7))  # name and patch of color
    add_legend(figure, artists, ncols=min(len(names), max(columns, 1)), loc="outside lower center")
    return _save(figure, path)


def plot_points(path: str | Path, panels: dict[str, dict[str, list[list[float]]]], x_label: str) -> Path:
    """Plot panels side by side, label -> group -> values at x = 1, 2, ...: a point per value and a line of means."""
    figure = TextFigure(figsize=(4.6 * len(panels), 3.4), dpi=120, layout="constrained")
    for number, (label, groups) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), number + 1)
        artists: dict[str, Artist] = {}
        for (name, rows), color in zip(groups.items(), COLORS, strict=False):
            for x, values in enumerate(rows, start=1):
                axes.scatter([x] * len(values), values, color=color, s=14, alpha=0.6, linewidths=0)
            (artists[name],) = axes.plot(range(1, len(rows) + 1), [np.mean(values) for values in rows], color=color)
        axes.set(xlabel=x_label, ylabel=label)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        add_legend(axes, artists)
    return _save(figure, path)


def plot_ranges(path: str | Path, panels: dict[str, dict[str, list[float]]], y_label: str, title: str = "") -> Path:
    """Plot panels side by side, label -> setting's value -> numbers: points, a line of means, and bars of ranges."""
    figure = TextFigure(figsize=(1.2 + 3.2 * len(panels), 3.4), dpi=120, layout="constrained")
    shared: Axes | None = None
    for number, (label, groups) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), number + 1, sharey=shared)
        shared = shared or axes
        known = {x: values for x, values in enumerate(groups.values()) if values}
        for x, values in known.items():
            axes.vlines(x, min(values), max(values), color=COLORS[0], alpha=0.4, linewidth=5)
            axes.scatter([x] * len(values), values, color=COLORS[0], s=14, alpha=0.6, linewidths=0)
        axes.plot(list(known), [np.mean(values) for values in known.values()], color=COLORS[1], marker=".")
        axes.set_xticks(range(len(groups)), [textwrap.fill(printable(value), 13) for value in groups])
        axes.set_xlim(-0.5, len(groups) - 0.5)
        axes.set(xlabel=label, ylabel=y_label if number == 0 else "")
        axes.grid(alpha=0.3, axis="y")
        axes.spines[["top", "right"]].set_visible(False)
    if title:
        figure.suptitle(title)
    return _save(figure, path)


def plot_palette(path: str | Path, colors: np.ndarray, images: np.ndarray, quantized: np.ndarray) -> Path:
    """Plot a palette as squares, and images before and after quantization.

    Args:
        path: PNG to write.
        colors: The palette, 'colors c' in [0, 1].
        images: Images 'b c h w' in [0, 1].
        quantized: The same images in the palette's colors.
    """
    columns = min(len(colors), 32)
    rows = -(-len(colors) // columns)
    squares = np.ones((rows * columns, colors.shape[1]))
    squares[: len(colors)] = colors
    figure = TextFigure(figsize=(8, 2.3 + 0.25 * rows), dpi=120, layout="constrained")
    parts = figure.add_gridspec(2, 1, height_ratios=[0.3 + 0.25 * rows, 2])
    top, bottom = figure.add_subfigure(parts[0]), figure.add_subfigure(parts[1])
    axes = top.add_subplot()
    _show(axes, squares.reshape(rows, columns, -1))
    axes.set_title(f"{len(colors)} colors")
    for number, (row, title) in enumerate([(images, "image"), (quantized, "in the palette")]):
        for column, image in enumerate(row):
            axes = bottom.add_subplot(2, len(row), number * len(row) + column + 1)
            _show(axes, image.transpose(1, 2, 0))
            if column == 0:
                axes.set_ylabel(title, rotation=0, ha="right", va="center")
    return _save(figure, path)


def _show(axes: Axes, pixels: np.ndarray) -> None:
    """Plot one image 'h w c' in [0, 1] without ticks; 1 channel as gray, more than 3 by the first 3."""
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)
    pixels = pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., 0]
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")


def _save(figure: Figure, path: str | Path) -> Path:
    """Write the figure atomically; the suffix determines the format."""
    path = Path(path)
    with new_file(path, sync=False) as temporary:
        figure.savefig(temporary, format=path.suffix.lstrip(".") or "png")
    return path
