"""Colors against the fixture (indices must match exactly), and palettes fitted on pixels."""

from __future__ import annotations

import pytest
import torch
from golden_fixtures import Golden, looks_at

from sslvit.models import ViTEncoder
from sslvit.palette import (
    CHUNK_PIXELS,
    colors_of,
    fit_palette,
    nearest_color,
    nearest_rows,
    squared_error,
    uniform_palette,
)
from sslvit.settings import EncoderSettings


@looks_at("palette", "config/*", "input/images", "input/palette", "output/kmeans/*", "output/uniform/*")
def test_nearest_colors_and_back(golden: Golden) -> None:
    images = golden["input/images"].permute(0, 3, 1, 2) / 127.5 - 1
    assert images.shape == (golden.config["batch"], 3, *[golden.config["size"]] * 2)
    for name, palette in (("kmeans", golden["input/palette"]), ("uniform", uniform_palette())):
        indices = nearest_color(images, palette)
        golden.check(f"output/{name}/indices", indices.flatten(1))
        decoded = ((colors_of(indices, palette) + 1) * 127.5).permute(0, 2, 3, 1)
        if name == "uniform":  # the middle of a box lies half-way between two bytes: the fixture takes the upper one
            decoded = decoded + 0.01
        golden.check(f"output/{name}/decoded", decoded.round())
    level = torch.stack([indices // 64, indices // 8 % 8, indices % 8], 3)  # the other convention: black to white
    golden.check("output/uniform/decoded_full_range", (level * 255 / 7).round())


@looks_at("palette", "input/tie_palette", "output/tie/*")
def test_ties_go_to_the_lowest_index(golden: Golden) -> None:
    palette = golden["input/tie_palette"]
    colors = palette.T.reshape(1, 3, 4, 4)
    golden.check("output/tie/indices", nearest_color(colors, palette).flatten())


def test_many_pixels_are_the_same_in_pieces() -> None:
    pixels, palette = torch.rand(2 * CHUNK_PIXELS + 5, 3) * 2 - 1, torch.rand(70, 3) * 2 - 1
    distance = (pixels.double()[:, None] - palette.double()).square().sum(2)
    assert torch.equal(nearest_rows(pixels, palette), distance.argmin(1))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest_rows(pixels, palette), distance.argmin(1))


def test_the_uniform_palette_of_grays_holds_bytes_by_their_upper_three_bits() -> None:
    values = torch.arange(256)
    grays = uniform_palette(1)
    assert torch.equal(nearest_rows(values[:, None] / 127.5 - 1, grays), values // 32)


@pytest.mark.parametrize(("channels", "palette"), [(3, "uniform"), (1, "uniform"), (1, [[-1.0], [-0.2], [0.9]])])
def test_the_encoders_colors_come_back_exactly(channels: int, palette) -> None:
    settings = EncoderSettings(
        image_size=4, channels=channels, tokens="pixel", patch=1, palette=palette, width=8, depth=1, heads=1,
        class_token=False, prefix_positions="none", pooling="mean",
    )  # fmt: skip
    pixels = ViTEncoder(settings).patch_embed
    indices = torch.randint(0, len(pixels.palette), (5, 16))
    images = pixels.images_of(indices, (4, 4))
    assert torch.equal(pixels.quantize(images), indices)
    shown = images * pixels.std + pixels.mean
    torch.testing.assert_close(shown.permute(0, 2, 3, 1).flatten(1, 2), (pixels.palette[indices] + 1) / 2)


def clouds(centers: torch.Tensor, each: int = 200) -> torch.Tensor:
    noise = torch.randn(len(centers) * each, centers.shape[1], generator=torch.Generator().manual_seed(0)) * 0.01
    return centers.repeat_interleave(each, 0) + noise


def test_clusters_are_found_and_sorted_from_dark_to_light() -> None:
    centers = torch.tensor([[0.8, 0.7, 0.9], [-0.9, -0.8, -0.9], [0.5, -0.5, 0.1], [-0.5, 0.6, -0.4]])
    pixels = clouds(centers)
    palette = fit_palette(pixels, 4)
    order = centers.sum(1).argsort()
    torch.testing.assert_close(palette, centers[order], atol=0.01, rtol=0)
    assert squared_error(pixels, palette) == pytest.approx(1e-4, rel=0.1)  # the noise's variance
    assert torch.equal(fit_palette(pixels, 4), palette)


def test_clusters_start_from_the_seed() -> None:
    pixels = torch.rand(3000, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    palettes = [fit_palette(pixels, 16, seed, range(1)) for seed in (0, 1, 1)]
    assert torch.equal(palettes[1], palettes[2])
    assert not torch.equal(palettes[0], palettes[1])


def test_the_error_is_the_mean_over_pixels_and_channels() -> None:
    pixels = torch.rand(500, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    palette = torch.rand(7, 3, generator=torch.Generator().manual_seed(1)) * 2 - 1
    distance = ((pixels[:, None].double() - palette.double()) ** 2).mean(2).min(1).values
    assert squared_error(pixels, palette) == pytest.approx(float(distance.mean()), rel=1e-6)


def test_the_rounds_of_k_means_end_in_a_local_optimum() -> None:
    pixels = torch.rand(20_000, 3, generator=torch.Generator().manual_seed(0)) ** 2 * 2 - 1
    palette = fit_palette(pixels, 64)
    nearest = nearest_rows(pixels, palette)
    means = torch.stack([pixels[nearest == color].mean(0) for color in range(64)])
    assert (means - palette).abs().max() < 0.02
    assert squared_error(pixels, palette) < 0.95 * squared_error(pixels, fit_palette(pixels, 64, rounds=range(1)))
    assert len(palette.unique(dim=0)) == 64


def test_few_colors_are_taken_as_they_are_and_too_many_are_refused() -> None:
    pixels = torch.tensor([[0.5], [-1.0], [0.25]]).repeat(50, 1)
    assert fit_palette(pixels, 3).tolist() == [[-1.0], [0.25], [0.5]]
    with pytest.raises(ValueError, match="--colors 4: these images have only 3 different ones"):
        fit_palette(pixels, 4)


def test_a_color_without_pixels_moves_to_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    import sklearn.cluster

    def two_alike(values, count, random_state):
        return values[[0, 0, -1]], None

    monkeypatch.setattr(sklearn.cluster, "kmeans_plusplus", two_alike)
    centers = torch.tensor([[-0.8], [0.7], [0.9]])
    torch.testing.assert_close(fit_palette(clouds(centers), 3), centers, atol=0.01, rtol=0)


def test_near_colors_start_alike_if_asked_to() -> None:
    def likeness(start: str) -> tuple[float, float]:
        torch.manual_seed(0)
        settings = EncoderSettings(
            image_size=4, tokens="pixel", patch=1, width=64, depth=1, heads=1, class_token=False, pooling="mean",
            prefix_positions="none", color_init=start,
        )  # fmt: skip
        pixels = ViTEncoder(settings).patch_embed
        directions = torch.nn.functional.normalize(pixels.embed.weight, dim=1)
        distance = torch.cdist(pixels.palette, pixels.palette)
        products = directions @ directions.T
        return float(products[(distance > 0) & (distance < 0.3)].mean()), float(products[distance > 2].mean())

    near, far = likeness("fourier")
    assert near > 0.8
    assert abs(far) < 0.1
    near, far = likeness("normal")
    assert abs(near) < 0.05


def test_fourier_vectors_of_colors_start_as_cosines_of_a_small_amplitude() -> None:
    settings = EncoderSettings(
        image_size=4, tokens="pixel", patch=1, width=256, depth=1, heads=1, class_token=False, pooling="mean",
        prefix_positions="none", color_init="fourier",
    )  # fmt: skip
    vectors = ViTEncoder(settings).patch_embed.embed.weight.detach()
    assert 0.29 < vectors.abs().max() <= 0.3
    assert vectors.std() == pytest.approx(0.3 / 2**0.5, rel=0.05)
