"""Sampling: the cache changes nothing, and the cuts cut what they say."""

from __future__ import annotations

import pytest
import torch
from test_igpt import gray, make
from test_mae import batch_of

from sslvit.models.sampling import complete, sample_colors, sampling_probs
from sslvit.settings.sample import SampleSettings

POSITIONS = ["none", "learned_1d", "learned_2d", "sincos_1d", "sincos_2d", "rotary_2d", "rotary_2d_normalized",
             "relative_bias"]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("cuts", [[0, 1, 2, 3], [7], [0, 5, 6, 15], [15]])
def test_reading_on_gives_the_logits_of_reading_all(positions: str, cuts: list[int]) -> None:
    task = make(pos_embed=positions, qk_norm=positions == "rotary_2d").eval()
    encoder = task.encoder
    images = gray(3)
    colors = encoder.patch_embed.quantize(images)
    memories = encoder.init_kv_cache(3)
    parts = [encoder.decode(colors[:, a:b], memories) for a, b in zip([0, *cuts], [*cuts, 15], strict=True)
             if b > a or (a == 0 and not memories[0].length)]  # fmt: skip
    cached, whole = task.model.head(torch.cat(parts, 1)), task.model.head(encoder(images))
    torch.testing.assert_close(cached, whole, atol=1e-5, rtol=1e-5)


def test_an_encoder_that_looks_both_ways_cannot_be_read_on() -> None:
    encoder = make("bert", causal=False, mask_token=True).encoder
    with pytest.raises(ValueError, match="only a causal encoder of pixels"):
        encoder.init_kv_cache(1)


def slow_completion(task, given: torch.Tensor, settings: SampleSettings) -> torch.Tensor:
    """The same by running the whole sequence again for each pixel."""
    import numpy as np

    from sslvit import rng

    encoder = task.encoder
    numbers = torch.from_numpy(rng.uniform((settings.seed, "sampling"), np.arange(len(given)), 16))
    drawn = torch.zeros(len(given), 16, dtype=torch.long)
    drawn[:, : given.shape[1]] = given
    for place in range(given.shape[1], 16):
        logits = task.model.head(encoder(encoder.patch_embed.images_of(drawn, (4, 4))))[:, place]
        drawn[:, place] = sample_colors(sampling_probs(logits, settings), numbers[:, place])
    return drawn


@torch.no_grad()
@pytest.mark.parametrize("known", [0, 1, 8, 15])
def test_completions_keep_what_is_given_and_equal_those_without_a_cache(known: int) -> None:
    task = make().eval().double()
    given = task.encoder.patch_embed.quantize(gray(5))[:, :known]
    settings = SampleSettings(batch=2, top_p=0.9, seed=4)
    drawn = complete(task.encoder, task.model.head, given, settings)
    assert torch.equal(drawn[:, :known], given)
    assert torch.equal(drawn, slow_completion(task, given, settings))
    assert drawn.max() < 8


@torch.no_grad()
def test_an_image_is_the_same_in_any_batch_and_another_under_another_seed() -> None:
    task = make().eval()
    nothing = torch.zeros(6, 0, dtype=torch.long)
    one, other, more = (complete(task.encoder, task.model.head, nothing, SampleSettings(batch=b, seed=s))
                        for b, s in ((6, 0), (4, 0), (6, 1)))  # fmt: skip
    assert torch.equal(one, other)
    assert not torch.equal(one, more)
    assert len({tuple(row) for row in one.tolist()}) > 1


def test_temperature_divides_and_zero_takes_the_likeliest() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    torch.testing.assert_close(sampling_probs(logits, SampleSettings()), logits.double().softmax(1))
    torch.testing.assert_close(
        sampling_probs(logits, SampleSettings(temperature=0.5)), (2 * logits).double().softmax(1)
    )
    assert sampling_probs(logits, SampleSettings(temperature=0)).tolist() == [[0, 1, 0]]


def test_top_k_keeps_exactly_k_also_in_a_tie() -> None:
    logits = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    assert sampling_probs(logits, SampleSettings(top_k=2)).tolist() == [[0.5, 0.5, 0, 0]]
    torch.testing.assert_close(sampling_probs(logits, SampleSettings(top_k=9)), logits.double().softmax(1))


def test_top_p_keeps_the_fewest_colors_that_have_that_probability() -> None:
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
    for top_p, kept in ((0.5, [0, 1, 0, 0]), (0.51, [0, 2 / 3, 0, 1 / 3]), (0.01, [0, 1, 0, 0]), (1.0, None)):
        expected = [[0.1, 0.5, 0.15, 0.25] if kept is None else kept]
        shares = sampling_probs(logits, SampleSettings(top_p=top_p))
        torch.testing.assert_close(shares, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)


def test_temperature_comes_first_then_top_k_then_top_p_of_what_is_left() -> None:
    shares = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    hot = shares[0].double().sqrt() / shares[0].double().sqrt().sum()  # temperature 2: about 0.325, 0.282, 0.230, 0.163
    found = sampling_probs(shares.log(), SampleSettings(temperature=2.0, top_p=0.65))
    kept = torch.cat([hot[:3], torch.zeros(1)])  # at temperature 1 the first two would have 0.7 together
    torch.testing.assert_close(found[0], kept / kept.sum(), atol=1e-6, rtol=0)
    both = sampling_probs(shares.log(), SampleSettings(top_k=3, top_p=0.5))  # of 0.444, 0.333, 0.222
    torch.testing.assert_close(both[0], torch.tensor([4 / 7, 3 / 7, 0, 0], dtype=torch.float64), atol=1e-6, rtol=0)


def test_colors_are_drawn_as_often_as_they_are_likely_and_never_where_they_are_not() -> None:
    shares = torch.tensor([[0.0, 0.5, 0.0, 0.3, 0.2, 0.0]], dtype=torch.float64).expand(1000, -1)
    numbers = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    assert torch.bincount(sample_colors(shares, numbers), minlength=6).tolist() == [0, 500, 0, 300, 200, 0]
    edges = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    assert sample_colors(shares[:2], edges).tolist() == [1, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"temperature": -1}, "--temperature"), ({"top_k": 0}, "--top-k 0"), ({"top_p": 0}, "--top-p 0"),
     ({"top_p": 1.1}, "--top-p 1.1"), ({"seed": -1}, "--seed"), ({"batch": 0}, "--batch")],
)  # fmt: skip
def test_settings_that_cannot_be_sampled_with_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SampleSettings(**changes)


@torch.no_grad()
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_quantizes_and_completes_as_the_cpu_does() -> None:
    task = make(pos_embed="rotary_2d").eval().double()
    images, settings = gray(40), SampleSettings(batch=16, top_p=0.9)
    results = []
    for device in ("cpu", "cuda"):
        task = task.to(device)
        with torch.autocast(device, torch.bfloat16):
            colors = task.encoder.patch_embed.quantize(images.to(device))
        drawn = complete(task.encoder, task.model.head, colors[:, :8], settings)
        figures = task.figures(batch_of(images[:4].to(device)))
        results.append((colors.cpu(), drawn.cpu(), figures["completed"][1]))
    (one, drawn_one, rows_one), (other, drawn_other, rows_other) = results
    assert torch.equal(one, other)
    assert torch.equal(drawn_one, drawn_other)
    assert all((a == b).all() for a, b in zip(rows_one, rows_other, strict=True))
