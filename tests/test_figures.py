"""Numbers over pictures."""

from __future__ import annotations

import numpy as np

from sslvit.figures import heat_over, only_where


def test_the_largest_number_of_a_map_is_its_brightest_place() -> None:
    images = np.zeros((2, 1, 4, 6))
    heat = np.array([[[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]], [[0.5, 0.0, 0.0], [0.0, 0.0, 2.0]]])
    drawn = heat_over(images, heat)
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
    shown = only_where(images, np.array([[[True, False], [False, True]]]))
    assert (shown[0, :, :2, :2] == 1).all()
    assert (shown[0, :, 2:, 2:] == 1).all()
    assert (shown[0, :, :2, 2:] < 0.2).all()
