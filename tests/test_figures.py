"""Numbers over pictures, and names in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

from sslvit import figures
from sslvit.figures import dim_outside, overlay_heat, plot_images
from sslvit.files import printable


def test_the_largest_number_of_a_map_is_its_brightest_place() -> None:
    images = np.zeros((2, 1, 4, 6))
    heat = np.array([[[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]], [[0.5, 0.0, 0.0], [0.0, 0.0, 2.0]]])
    drawn = overlay_heat(images, heat)
    assert drawn.shape == (2, 3, 4, 6)
    brightness = drawn.sum(1)
    for number, (row, column) in enumerate([(0, 1), (1, 2)]):
        cell = brightness[number, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert (cell == brightness[number].max()).all()
        assert (brightness[number] == brightness[number].max()).sum() == 4
    assert drawn.min() >= 0
    assert drawn.max() <= 1


def test_only_the_kept_patches_stay_bright() -> None:
    images = np.ones((1, 3, 4, 4))
    shown = dim_outside(images, np.array([[[True, False], [False, True]]]))
    assert (shown[0, :, :2, :2] == 1).all()
    assert (shown[0, :, 2:, 2:] == 1).all()
    assert (shown[0, :, :2, 2:] < 0.2).all()


NAMES = ["$x_$", "$\\frac{1}{$", "_hidden", "=1+1", "<script>", "a|b", "two\nlines", "\x1b[31mred", "\udcff.png",
         "日本", "{}", "%s", "\\n", ""]  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", NAMES)
def test_any_name_can_stand_in_a_picture(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    paint = Text.draw

    def note(self, renderer) -> None:
        shown.append(self.get_text())
        assert not self.get_parse_math()
        paint(self, renderer)

    monkeypatch.setattr(Text, "draw", note)
    other = f"{name} 2"
    image = np.zeros((2, 1, 4, 4))
    line = ([1.0, 2.0], [0.0, 1.0])
    drawings = [
        figures.plot_images(tmp_path / "rows.png", [image, image], [name, other], name),
        figures.plot_curves(tmp_path / "curves.png", {name: line, other: line}, name, name, name, (1.5, f"{name} 3")),
        figures.plot_bars(tmp_path / "bars.png", {name: {name: 1.0, other: 2.0}, other: {name: 3.0}}, name, name),
        figures.plot_points(tmp_path / "points.png", {name: {name: [[1.0]], other: [[2.0, 3.0]]}}, name),
    ]
    assert all(drawing.stat().st_size > 1000 for drawing in drawings)
    whole = "\n".join(printable(part) for part in name.split("\n"))
    assert shown.count(whole) >= (9 if "\n" in name else 10)  # legends of curves, bars and points among them


def test_a_row_shows_each_image_in_its_place_with_white_between_them(tmp_path: Path) -> None:
    shades = np.array([0.2, 0.5, 0.8])
    row = np.broadcast_to(shades[:, None, None, None], (3, 1, 20, 10))
    colored = np.stack([row[:, 0]] * 2 + [np.zeros((3, 20, 10))], 1)
    path = figures.plot_images(tmp_path / "rows.png", [row, colored], ["", ""])
    pixels = np.asarray(Image.open(path).convert("RGB"), float) / 255
    height, width = pixels.shape[:2]
    middles = [round(width * (0.05 + column + 0.47) / 3.1) for column in range(3)]
    np.testing.assert_allclose(pixels[height // 4, middles], np.stack([shades] * 3, 1), atol=0.01)
    np.testing.assert_allclose(pixels[3 * height // 4, middles, 1], shades, atol=0.01)
    np.testing.assert_allclose(pixels[3 * height // 4, middles, 2], 0, atol=0.01)
    assert pixels[height // 4, round(width * 1.02 / 3.1)].min() == 1
    assert 1.2 < height / width < 1.4  # two rows of images that are twice as high as wide


def test_titles_of_rows_are_not_cut_off(tmp_path: Path) -> None:
    rows = [np.zeros((2, 1, 4, 4))] * 2
    for title in (
        "MAE",
        "WWWWWWWWWWWWWWWWWWWW",
        "a sentence that is longer than the images are wide",
        "two\nlines of it",
    ):
        drawn = np.asarray(Image.open(plot_images(tmp_path / "rows.png", rows, [title, "x"])).convert("L"))
        assert (drawn[:, :2] == 255).all(), title
        assert (drawn < 255).any()


@pytest.mark.parametrize("side", [16, 256])
def test_titles_of_wide_images_and_of_a_narrow_figure_are_legible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: int
) -> None:
    kept: list = []
    monkeypatch.setattr("sslvit.figures._save", lambda figure, path: kept.append(figure) or Path(path))
    rows = [np.zeros((2, 3, 16, side))] * 3
    title = "the nearest of 3 images, by the cosine similarity of their features"
    plot_images(tmp_path / "rows.png", rows, ["input", "what the\nencoder sees", "reconstruction"], title)
    (figure,) = kept
    figure.savefig(tmp_path / "rows.png")  # sets the size of all text
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [text.get_window_extent(renderer) for text in [*figure.axes[0].texts, *figure.texts]]
    assert len(boxes) == 4
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)


def test_numbers_stand_above_their_intervals_and_legends_within_the_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: kept.append(figure) or path)
    names = [f"a method with a long name, number {number}" for number in range(6)]
    halves = {"group": {names[0]: 7.0}}
    figures.plot_bars(tmp_path / "bars.png", {"group": dict.fromkeys(names, 50.0)}, "accuracy (%)", halves=halves)
    (figure,) = kept
    heights = [text.get_position()[1] for text in figure.axes[0].texts]
    assert heights == [57.0] + [50.0] * 5
    figure.savefig(tmp_path / "bars.png")
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1
