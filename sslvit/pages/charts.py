"""Line charts and bars as inline SVG in the page's colors; a short script shows the values under the pointer."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence

import numpy as np

from sslvit.files import printable
from sslvit.results import html_text

WIDTH, HEIGHT = 640, 250
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 10, 42  # margins
MAX_POINTS = 400  # of a line; more points are averaged
SMOOTHED_FROM = 40  # points from which on a smoothed line is drawn as well
COLORS = 6  # var(--c0) to var(--c5)
DASHES = ("", "6 3", "2 3")  # used in turn when the colors repeat
MAX_NAME = 70  # characters of a row's name, which is as wide as a figure
STEEP = 4.0  # cut off the top 2 % of values if the full range is more than this times the rest

SCRIPT = """
for (const figure of document.querySelectorAll("figure[data-lines]")) {
  const lines = JSON.parse(figure.dataset.lines), [low, high, left, right, unit] = JSON.parse(figure.dataset.axis);
  const [svg, mark, output] = ["svg:not(.chip)", ".mark", "output"].map(name => figure.querySelector(name));
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), at = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const x = low + (at - left) / (right - left) * (high - low);
    if (x < low || x > high) return;
    const near = lines.filter(([, xs]) => {
      const gap = xs.length > 1 ? xs[1] - xs[0] : 0;
      return x >= xs[0] - gap && x <= xs[xs.length - 1] + gap;
    }).map(([name, xs, ys]) => {
      const i = xs.reduce((best, one, j) => Math.abs(one - x) < Math.abs(xs[best] - x) ? j : best, 0);
      return [name, xs[i], ys[i]];
    });
    if (!near.length) return;
    const first = near.reduce((a, b) => Math.abs(b[1] - x) < Math.abs(a[1] - x) ? b : a)[1];
    const place = left + (first - low) / (high - low || 1) * (right - left);
    mark.setAttribute("x1", place); mark.setAttribute("x2", place); mark.setAttribute("visibility", "visible");
    output.textContent = `${unit} ${Math.round(first).toLocaleString("en")}: ` +
      near.map(([name, , y]) => `${name} ${+y.toPrecision(4)}`).join(", ");
  });
}
"""

Lines = Mapping[str, tuple[Sequence[float], Sequence[float]]]


def line_chart(title: str, lines: Lines, x_label: str, y_label: str) -> str:
    """Make a figure with one line per name, from x and y of equal length; non-finite points are left out.

    Returns an empty string if there is nothing to plot.
    """
    drawn = {name: thinned(x, y) for name, (x, y) in lines.items()}
    drawn = {name: (x, y) for name, (x, y) in drawn.items() if len(x)}
    if not drawn:
        return ""
    low_x, high_x = (float(end([end(x) for x, _ in drawn.values()])) for end in (min, max))
    low, high = value_range(np.concatenate([y for _, y in drawn.values()]))
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def to_pixels(x: np.ndarray | float, y: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        across = LEFT + (np.asarray(x) - low_x) / ((high_x - low_x) or 1) * (right - LEFT)
        return across, np.clip(bottom - (np.asarray(y) - low) / (high - low) * (bottom - TOP), TOP, bottom)

    shapes = []
    marks = ticks(low, high)
    step = marks[1] - marks[0] if len(marks) > 1 else None
    for value in marks:
        up = float(to_pixels(low_x, value)[1])
        shapes.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{up:.1f}" y2="{up:.1f}"/>')
        shapes.append(f'<text x="{LEFT - 6}" y="{up + 4:.1f}" text-anchor="end">{short(value, step)}</text>')
    is_whole = all((x == np.round(x)).all() for x, _ in drawn.values())  # there is no step 1.5
    for value in ticks(low_x, high_x, smallest=1.0 if is_whole else 0.0):
        across = float(to_pixels(value, low)[0])
        shapes.append(f'<text x="{across:.1f}" y="{bottom + 16}" text-anchor="middle">{short(value)}</text>')
    shapes.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{html_text(x_label)}</text>')
    middle = (TOP + bottom) / 2
    shapes.append(
        f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{html_text(y_label)}</text>'
    )
    keys = []
    for number, (name, (x, y)) in enumerate(drawn.items()):
        look = f"stroke:var(--c{number % COLORS});stroke-dasharray:{DASHES[number // COLORS % len(DASHES)] or 'none'}"
        is_smoothed = len(x) >= SMOOTHED_FROM
        shapes.append(_path(*to_pixels(x, y), "raw" if is_smoothed else "smooth", look))
        if is_smoothed:
            shapes.append(_path(*to_pixels(x, smoothed(y)), "smooth", look))
        chip = f'<svg class="chip" viewBox="0 0 24 8"><path class="smooth" d="M0 4L24 4" style="{look}"/></svg>'
        keys.append(f'<span class="key">{chip}{html_text(name)}</span>')
    values = [[name, np.round(x, 2).tolist(), [float(f"{v:.6g}") for v in y]] for name, (x, y) in drawn.items()]
    axis = json.dumps([low_x, high_x, LEFT, right, x_label])
    return (
        f'<figure data-lines="{html.escape(json.dumps(values))}" data-axis="{html.escape(axis)}">'
        f"<figcaption><strong>{html_text(title)}</strong> {''.join(keys)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html_text(title)}">{"".join(shapes)}'
        f'<line class="mark" y1="{TOP}" y2="{bottom}" visibility="hidden"/></svg><output></output></figure>'
    )


def breakdown_chart(title: str, rows: Mapping[str, Mapping[str, float]], unit: str) -> str:
    """Make a figure with a stacked horizontal bar for each row."""
    names = list(dict.fromkeys(name for of in rows.values() for name in of))
    longest = max((sum(of.values()) for of in rows.values()), default=0.0)
    if not longest:
        return ""
    made = []
    for number, (row, of) in enumerate(rows.items()):
        x, y = 0.0, number * 46
        name = html_text(printable(row, MAX_NAME))
        made.append(f'<text x="0" y="{y + 14}">{name}: {sum(of.values()):.3g} {html_text(unit)}</text>')
        for color, name in enumerate(names):
            width = WIDTH * of.get(name, 0.0) / longest
            made.append(
                f'<rect x="{x:.1f}" y="{y + 20}" width="{width:.1f}" height="18" style="fill:var(--c{color % COLORS})">'
                f"<title>{html_text(name)} {of.get(name, 0.0):.3g} {html_text(unit)}</title></rect>"
            )
            x += width
    keys = [
        f'<span class="key"><i style="background:var(--c{color % COLORS})"></i>{html_text(name)}</span>'
        for color, name in enumerate(names)
    ]
    return (
        f"<figure><figcaption><strong>{html_text(title)}</strong> {''.join(keys)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {46 * len(rows)}" role="img" aria-label="{html_text(title)}">{"".join(made)}</svg>'
        "</figure>"
    )


def thinned(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """The finite points of a line; if there are too many, means of adjacent points."""
    across, up = np.asarray(x, float), np.asarray(y, float)
    is_finite = np.isfinite(across) & np.isfinite(up)
    across, up = across[is_finite], up[is_finite]
    if len(across) <= MAX_POINTS:
        return across, up
    pieces = [np.array_split(values, MAX_POINTS) for values in (across, up)]
    return np.array([piece.mean() for piece in pieces[0]]), np.array([piece.mean() for piece in pieces[1]])


def smoothed(y: np.ndarray) -> np.ndarray:
    """Moving average over a fifteenth of the points, and over fewer near both ends."""
    half = max(1, len(y) // 30)
    sums = np.concatenate([[0.0], np.cumsum(y)])
    first = np.maximum(np.arange(len(y)) - half, 0)
    last = np.minimum(np.arange(len(y)) + half + 1, len(y))
    return (sums[last] - sums[first]) / (last - first)


def value_range(values: np.ndarray) -> tuple[float, float]:
    """The range of an axis, without a few values far above the rest, as at the start of a run."""
    low, high = float(values.min()), float(values.max())
    most = float(np.quantile(values, 0.98))
    if high - low > STEEP * (most - low) > 0:
        high = most
    margin = 0.05 * (high - low) or abs(high) * 0.05 or 1.0
    return low - margin, high + margin


def ticks(low: float, high: float, count: int = 5, smallest: float = 0.0) -> list[float]:
    """About `count` round numbers within a range, at least `smallest` apart."""
    rough = (high - low) / count or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = max(next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999), smallest)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float, step: float | None = None) -> str:
    """Format an axis label in few characters, but enough to distinguish numbers that differ by `step`."""
    if value == 0 or abs(value) < (step or 0.0) / 1e6:
        return "0"
    digits = max(3, math.ceil(math.log10(abs(value) / step)) + 1) if step else 3
    for limit, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.{max(digits, 6)}g}{sign}"
    return f"{value:.{digits}g}"


def _path(x: np.ndarray, y: np.ndarray, kind: str, look: str) -> str:
    if len(x) == 1:
        return f'<circle cx="{x[0]:.1f}" cy="{y[0]:.1f}" r="3" style="fill:{look.split(":")[1].split(";")[0]}"/>'
    points = "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y, strict=True))
    return f'<path class="{kind}" d="M{points}" style="{look}"/>'
