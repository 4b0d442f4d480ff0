"""Charts: what is plotted where, what is averaged, what is cut off, and that names cannot become markup."""

from __future__ import annotations

import html
import json
import re

import numpy as np
import pytest

from sslvit.pages.charts import HEIGHT, LEFT, MAX_POINTS, WIDTH, breakdown_chart, line_chart, smoothed, thinned, ticks

from sslvit.pages.charts import BOTTOM, RIGHT, TOP, short, value_range  # isort: skip


def lines_of(chart: str) -> list:
    found = re.search(r'data-lines="(.*?)"', chart)
    assert found
    return json.loads(html.unescape(found[1]))


def test_a_line_runs_from_corner_to_corner() -> None:
    chart = line_chart("Loss", {"a": ([0, 10], [1.0, 3.0])}, "step", "loss")
    ((first, last),) = re.findall(r'class="smooth" d="M(.*?)L(.*?)"', chart.partition("</figcaption>")[2])
    (x0, y0), (x1, y1) = (map(float, point.split()) for point in (first, last))
    assert (x0, x1) == (LEFT, WIDTH - RIGHT)
    room = HEIGHT - BOTTOM - TOP
    assert y0 == pytest.approx(HEIGHT - BOTTOM - room * 0.05 / 1.1, abs=0.1)  # a twentieth of the range is a margin
    assert y1 == pytest.approx(TOP + room * 0.05 / 1.1, abs=0.1)
    assert lines_of(chart) == [["a", [0.0, 10.0], [1.0, 3.0]]]


def test_what_is_not_finite_is_left_out_and_nothing_to_plot_is_no_chart() -> None:
    chart = line_chart("Loss", {"a": ([1, 2, 3], [1.0, float("nan"), 2.0]), "b": ([], [])}, "step", "loss")
    assert lines_of(chart) == [["a", [1.0, 3.0], [1.0, 2.0]]]
    assert line_chart("Loss", {"a": ([1], [float("inf")])}, "step", "loss") == ""
    assert breakdown_chart("Time", {}, "ms") == ""


def test_many_points_are_averaged() -> None:
    x, y = thinned(list(range(4000)), [float(number) for number in range(4000)])
    assert len(x) == MAX_POINTS
    assert (x[0], y[0]) == (4.5, 4.5)  # the mean of the first ten


def test_a_smooth_line_is_a_mean_of_neighbors_that_keeps_the_ends_in_their_places() -> None:
    line = np.arange(60.0)
    np.testing.assert_allclose(smoothed(line)[2:-2], line[2:-2])
    assert smoothed(line)[0] == pytest.approx(1.0)  # of 0, 1, 2
    source = np.random.default_rng(0).normal(size=400)
    assert smoothed(source).std() < 0.4 * source.std()


def test_a_few_values_at_the_start_do_not_flatten_the_rest() -> None:
    low, high = value_range(np.concatenate([[900.0], np.linspace(1, 2, 99)]))
    assert low == pytest.approx(1 - 0.05 * (high - low) / 1.1, abs=0.01)
    assert high < 2.2
    assert value_range(np.linspace(0, 10, 50)) == pytest.approx((-0.5, 10.5))  # a steady line is shown whole
    low, high = value_range(np.full(5, 3.0))
    assert low < 3 < high


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.31, 0.52, [0.35, 0.4, 0.45, 0.5]),
        (0, 14480, [0, 5000, 10000]),
        (2, 2, [2]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_there_are_no_ticks_between_steps() -> None:
    assert ticks(0, 2, smallest=1.0) == [0, 1, 2]
    steps = re.compile(r'text-anchor="middle">([\d.]+)</text>')
    assert steps.findall(line_chart("Loss", {"a": ([1, 2, 3], [1, 2, 3])}, "step", "loss")) == ["1", "2", "3"]
    assert "1.5" in steps.findall(line_chart("Loss", {"a": ([1, 1.5, 3], [1, 2, 3])}, "epoch", "loss"))


def test_a_long_name_leaves_room_for_its_number() -> None:
    chart = breakdown_chart("Time", {"run " * 100: {"data": 1.0}}, "ms")
    (label,) = re.findall(r"<text[^>]*>([^<]*)</text>", chart)
    assert label.endswith("... : 1 ms") or label.endswith("...: 1 ms")
    assert len(label) < 90


def test_numbers_of_axes_are_short() -> None:
    assert [short(value) for value in (0, 0.30000000000000004, 2500, 3e6, -2e9)] == ["0", "0.3", "2.5k", "3M", "-2G"]


def test_ticks_that_differ_little_are_told_apart() -> None:
    marks = ticks(8.317, 8.318)
    labels = [short(value, marks[1] - marks[0]) for value in marks]
    assert len(set(labels)) == len(labels) > 3
    assert labels[0] == "8.317"


def test_lines_beyond_the_colors_differ_in_their_key() -> None:
    chart = line_chart("Loss", {f"run {number}": ([0, 1], [0, 1]) for number in range(8)}, "step", "loss")
    chips = re.findall(r'<svg class="chip".*?</svg>', chart)
    assert len(set(chips)) == 8


def test_a_line_alone_has_a_key_too_since_a_chart_may_show_several_metrics() -> None:
    assert "</svg>probe/knn</span>" in line_chart("Accuracy", {"probe/knn": ([1, 2], [3, 4])}, "step", "%")


def test_names_are_no_markup() -> None:
    hostile = '"><script>alert(1)</script>'
    for chart in (
        line_chart(hostile, {hostile: ([1, 2], [1, 2]), "b": ([1], [1])}, hostile, hostile),
        breakdown_chart(hostile, {hostile: {hostile: 1.0}}, hostile),
    ):
        assert "<script" not in chart
        assert "alert(1)" in chart


def test_bars_are_as_long_as_their_parts() -> None:
    chart = breakdown_chart("Time", {"a": {"data": 1.0, "forward": 3.0}, "b": {"forward": 2.0}}, "ms")
    widths = [float(found) for found in re.findall(r'<rect x="[\d.]+" y="\d+" width="([\d.]+)"', chart)]
    assert widths == pytest.approx([WIDTH / 4, 3 * WIDTH / 4, 0, WIDTH / 2], abs=0.1)
    assert "a: 4 ms" in chart
