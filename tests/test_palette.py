"""Colours against the fixture: indices must match exactly."""

from __future__ import annotations

import torch
from golden_fixtures import Golden

from sslvit.palette import colours_of, nearest_colour, uniform_palette


def as_bytes(colours: torch.Tensor) -> torch.Tensor:
    return ((colours + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


def test_nearest_colours_and_back() -> None:
    golden = Golden("palette")
    images = golden["input/images"].permute(0, 3, 1, 2) / 127.5 - 1
    for name, palette in (("kmeans", golden["input/palette"]), ("uniform", uniform_palette())):
        indices = nearest_colour(images, palette)
        golden.check(f"output/{name}/indices", indices.flatten(1))
    golden.check(
        "output/kmeans/decoded",
        as_bytes(colours_of(nearest_colour(images, golden["input/palette"]), golden["input/palette"])),
    )


def test_ties_go_to_the_lowest_index() -> None:
    golden = Golden("palette")
    palette = golden["input/tie_palette"]
    colours = palette.T.reshape(1, 3, 4, 4)
    golden.check("output/tie/indices", nearest_colour(colours, palette).flatten())
