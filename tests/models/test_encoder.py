"""What each option of the encoder does."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from sslvit.models import ViTEncoder, preset, transformer
from sslvit.models.positions import (
    RelativeBias,
    TokenLayout,
    interpolate,
    normalized_coordinates,
    resample_table,
    rotary_2d,
    rotate,
    scaled_coordinates,
)
from sslvit.models.resize import resize_weights
from sslvit.models.transformer import drop_path
from sslvit.settings import PRESETS, EncoderSettings

POSITIONS = ["none", "learned_1d", "learned_2d", "sincos_1d", "sincos_2d", "rotary_2d", "rotary_2d_normalized",
             "relative_bias"]  # fmt: skip
TOKENS = ["patch", "conv_stem", "mbconv", "shifted_patch", "hybrid"]


def make(**changes) -> ViTEncoder:
    torch.manual_seed(0)
    encoder = ViTEncoder(
        EncoderSettings(**{"image_size": 32, "patch": 8, "width": 48, "depth": 3, "heads": 4} | changes)
    )
    with torch.no_grad():
        for parameter in encoder.parameters():  # no term is silently zero or one
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return encoder.eval()


def pixels(**changes) -> ViTEncoder:
    return make(
        tokens="pixel", patch=1, image_size=6, class_token=False, prefix_positions="none", pooling="mean", **changes
    )


def images(height: int = 32, width: int = 32, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize(("tokens", "positions"), list(itertools.product(TOKENS, POSITIONS)))
def test_visible_patches_alone_equal_a_full_pass_cut_before_the_first_block(tokens: str, positions: str) -> None:
    encoder = make(hybrid_backbone="resnet18", tokens=tokens, pos_embed=positions)
    everything = torch.arange(16).flip(0).expand(2, -1)  # all patches in another order
    shuffled, plain = encoder(images(), visible=everything), encoder(images())
    torch.testing.assert_close(shuffled[:, 0], plain[:, 0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(shuffled[:, 1:].flip(1), plain[:, 1:], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_hidden_pixels_do_not_reach_the_visible_tokens() -> None:
    encoder = make()
    visible = torch.tensor([[5, 0, 3], [1, 15, 2]])
    one, other = images(), images()
    other[0, :, 24:, 24:] += 1.0  # patch 15 of the first image, not visible there
    other[1, :, 24:, 24:] += 1.0  # patch 15 of the second image, visible there
    before, after = encoder(one, visible), encoder(other, visible)
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


def test_visible_patches_cost_only_themselves() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    encoder = make(class_token=False, pooling="mean", pos_embed="sincos_2d", prefix_positions="none", depth=1)
    counts = []
    for visible in (None, torch.arange(4).expand(2, -1)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            encoder(images(), visible)
        products = counter.get_flop_counts()["Global"]
        counts.append(sum(count for operation, count in products.items() if "mm" in str(operation)))
    linear = sum(p.numel() for name, p in encoder.named_parameters() if p.ndim > 1)
    assert counts == [2 * 2 * n * linear for n in (16, 4)]  # two images, two operations per weight and patch


@torch.no_grad()
@pytest.mark.parametrize("tokens", [*TOKENS, "pixel"])
def test_mask_tokens_stand_where_patches_are_hidden(tokens: str) -> None:
    encoder = (
        pixels(mask_token=True)
        if tokens == "pixel"
        else make(hybrid_backbone="resnet18", tokens=tokens, mask_token=True)
    )
    side = encoder.settings.image_size[0]
    is_hidden = torch.zeros(2, encoder.settings.grid[0] ** 2, dtype=torch.bool)
    is_hidden[:, 3] = True
    tokens_before, _ = encoder.embed(images(side, side))
    tokens_after, _ = encoder.embed(images(side, side), hidden=is_hidden)
    changed = (tokens_before != tokens_after).any(2)
    expected = torch.zeros_like(changed)
    expected[:, encoder.prefix + 3] = True
    assert torch.equal(changed, expected)
    _, patches = encoder.position_table(encoder.settings.grid)
    torch.testing.assert_close(tokens_after[0, encoder.prefix + 3], encoder.mask_token[0, 0] + patches[3])


@torch.no_grad()
def test_hidden_patches_are_named_by_their_place_in_the_image_also_among_visible_ones() -> None:
    encoder = make(mask_token=True)
    is_hidden = torch.zeros(2, 16, dtype=torch.bool)
    is_hidden[0, 5] = is_hidden[1, 2] = True
    visible = torch.tensor([[9, 5, 1], [2, 9, 5]])
    some, _ = encoder.embed(images(), visible, is_hidden)
    every, _ = encoder.embed(images(), hidden=is_hidden)
    for row in range(2):
        torch.testing.assert_close(some[row, 1:], every[row, 1 + visible[row]])


def test_hidden_without_a_mask_token_is_refused() -> None:
    with pytest.raises(ValueError, match="mask_token to true"):
        make()(images(), hidden=torch.zeros(2, 16, dtype=torch.bool))


@torch.no_grad()
@pytest.mark.parametrize("positions", POSITIONS)
def test_positions_see_order_and_none_does_not(positions: str) -> None:
    encoder = make(pos_embed=positions)
    swapped = images().clone()
    swapped[:, :, :8, :8], swapped[:, :, :8, 8:16] = images()[:, :, :8, 8:16], images()[:, :, :8, :8]
    difference = (encoder(images())[:, 0] - encoder(swapped)[:, 0]).abs().max()
    assert (difference < 1e-5) == (positions == "none")


@torch.no_grad()
def test_rotary_angles_by_hand() -> None:
    """A quarter of a head by row, a quarter by column, base 100; other grids lie on the trained one."""
    for grid, stretch in (((2, 3), 1.0), ((4, 6), 0.5)):
        cos, sin = rotary_2d(scaled_coordinates(grid, (2, 3), torch.device("cpu")), 8)
        row, column = (torch.arange(side) * stretch + (stretch - 1) / 2 for side in grid)
        for place, (r, c) in enumerate(itertools.product(row.tolist(), column.tolist())):
            angles = torch.tensor([r, r / 10, c, c / 10])
            torch.testing.assert_close(cos[place], angles.cos())
            torch.testing.assert_close(sin[place], angles.sin())
    head = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0]).view(1, 1, 1, 8)
    turned = rotate(head, (torch.zeros(1, 4), torch.ones(1, 4)))  # by a quarter turn
    assert turned.flatten().tolist() == [0, 0, 0, 0, 1, 0, 0, 0]


@torch.no_grad()
def test_normalized_angles_by_hand() -> None:
    """Centers of the patches from -1 to 1 along each side of any grid, in full turns at the first period, 1."""
    for rows, columns in ((2, 4), (1, 3)):
        cos, sin = rotary_2d(normalized_coordinates((rows, columns), torch.device("cpu")), 8)
        for place, (r, c) in enumerate(itertools.product(range(rows), range(columns))):
            row, column = (2 * (r + 0.5) / rows - 1) * 2 * math.pi, (2 * (c + 0.5) / columns - 1) * 2 * math.pi
            angles = torch.tensor([row, row / 10, column, column / 10])
            torch.testing.assert_close(cos[place], angles.cos(), atol=1e-6, rtol=0)
            torch.testing.assert_close(sin[place], angles.sin(), atol=1e-6, rtol=0)


@torch.no_grad()
def test_the_bias_between_two_patches_is_that_of_their_offset() -> None:
    bias = RelativeBias(heads=2, grid=(2, 3))
    bias.table.copy_(torch.randn(2, 3, 5))
    whole = bias(TokenLayout((2, 3), prefix=1))
    assert not whole[:, 0].any()
    assert not whole[:, :, 0].any()
    for (one, (r, c)), (other, (s, d)) in itertools.product(enumerate(itertools.product(range(2), range(3))), repeat=2):
        assert torch.equal(whole[:, 1 + one, 1 + other], bias.table[:, r - s + 1, c - d + 2])
    larger = bias(TokenLayout((3, 3), prefix=0))
    wide = torch.nn.functional.interpolate(bias.table[None], (5, 5), mode="bicubic", antialias=True)[0]
    torch.testing.assert_close(larger[:, 0, 8], wide[:, 0, 0])
    torch.testing.assert_close(larger[:, 7, 0], wide[:, 4, 3])


@torch.no_grad()
@pytest.mark.parametrize("positions", ["rotary_2d", "rotary_2d_normalized", "relative_bias"])
def test_relative_positions_do_not_see_a_common_shift(positions: str) -> None:
    """A 2 x 2 pattern of visible patches gives the same tokens wherever it lies."""
    encoder = make(pos_embed=positions, class_token=False, pooling="mean")  # a class token has no place to turn by
    pattern = images(16, 16)
    tokens = []
    for top, left in ((0, 0), (1, 2)):
        canvas = torch.zeros(2, 3, 32, 32)
        canvas[:, :, top * 8 : top * 8 + 16, left * 8 : left * 8 + 16] = pattern
        visible = torch.tensor([(top + r) * 4 + left + c for r in (0, 1) for c in (0, 1)]).expand(2, -1)
        tokens.append(encoder(canvas, visible))
    torch.testing.assert_close(tokens[0], tokens[1], atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("tokens", "positions"), list(itertools.product(TOKENS, POSITIONS)))
def test_other_sizes_pass_and_the_own_size_is_not_resampled(tokens: str, positions: str) -> None:
    encoder = make(hybrid_backbone="resnet18", tokens=tokens, pos_embed=positions)
    assert encoder(images(40, 64)).shape == (2, 1 + 5 * 8, 48)
    if positions in ("learned_1d", "learned_2d", "sincos_1d", "sincos_2d"):
        _, own = encoder.position_table((4, 4))
        _, other = encoder.position_table((8, 8))
        smooth = torch.nn.functional.avg_pool2d(other.T.reshape(1, 48, 8, 8), 2)[0].flatten(1).T
        assert torch.nn.functional.cosine_similarity(smooth, own).min() > 0.7


@torch.no_grad()
@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_one_column_of_positions_is_interpolated_as_one_row_is(offset: float) -> None:
    """Which torch does not do where it antialiases."""
    row = torch.randn(1, 5, 1, 8, generator=torch.Generator().manual_seed(0))
    for columns in (12, 4, 1):
        to = (1, columns)
        expected = F.interpolate(row.expand(-1, -1, 8, -1), size=(8, columns), mode="bicubic", antialias=True)[:, :, :1]
        if not offset:
            torch.testing.assert_close(interpolate(row, to), expected)
        one, other = (interpolate(image, size, True, offset) for image, size in ((row, to), (row.mT, to[::-1])))
        torch.testing.assert_close(other.mT, one)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("positions", ["learned_1d", "learned_2d", "sincos_2d", "relative_bias"])
def test_an_encoder_of_16_bits_sees_other_sizes_on_a_cpu(dtype: torch.dtype, positions: str) -> None:
    encoder = make(pos_embed=positions)
    expected = encoder(images(64, 32))
    found = encoder.to(dtype)(images(64, 32).to(dtype))
    assert found.dtype == dtype
    assert torch.nn.functional.cosine_similarity(found.float(), expected, dim=2).min() > 0.99


@torch.no_grad()
def test_tables_that_grow_evenly_do_so_at_twice_the_size() -> None:
    """Bicubic interpolation keeps a straight line, away from the edges: i of 2 n lies at (i + 0.5) / 2 - 0.5."""
    encoder = make(image_size=[32, 64], pos_embed="learned_2d", class_token=False, pooling="mean")
    encoder.pos_embed_row.copy_(torch.arange(4.0)[:, None, None].expand(4, 1, 48))
    encoder.pos_embed_column.copy_(10 * torch.arange(8.0)[None, :, None].expand(1, 8, 48))
    _, table = encoder.position_table((8, 16))
    row, column = ((torch.arange(side) + 0.5) / 2 - 0.5 for side in (8, 16))
    expected = row[:, None] + 10 * column[None]
    torch.testing.assert_close(table[:, 0].view(8, 16)[3:-3, 3:-3], expected[3:-3, 3:-3])
    bias = RelativeBias(1, (4, 8))
    bias.table.copy_(torch.arange(-3.0, 4)[None, :, None] + 10 * torch.arange(-7.0, 8)[None, None])
    found = bias(TokenLayout((8, 16), 0))[0].view(8, 16, 8, 16)
    # offsets, of which there are 2 n - 1 along a side, are spread over the same range
    for one, other in (((4, 8), (3, 5)), ((2, 9), (4, 3)), ((5, 5), (5, 5))):
        down, right = one[0] - other[0], one[1] - other[1]
        expected = torch.tensor(down * 7 / 15 + 10 * right * 15 / 31)
        torch.testing.assert_close(found[*one, *other], expected, atol=1e-4, rtol=1e-4)


def test_size_that_the_patch_does_not_divide_is_refused_with_a_remedy() -> None:
    with pytest.raises(ValueError, match=r"30 x 32 .*patches of 8.*Set encoder.image_size to 32"):
        EncoderSettings(image_size=[30, 32], patch=8)
    with pytest.raises(ValueError, match=r"33 x 32 "):
        make()(images(33, 32))
    with pytest.raises(ValueError, match="1 channels, this encoder takes 3"):
        make()(images(channels=1))


def test_a_pixel_sequence_keeps_its_size() -> None:
    with pytest.raises(ValueError, match="tied to its size"):
        pixels(causal=True)(images(7, 7))


@torch.no_grad()
def test_causal_pixels_depend_on_earlier_pixels_only() -> None:
    encoder = pixels(causal=True)
    base = images(6, 6)
    before = encoder(base)
    for place in range(36):
        other = base.clone()
        other[:, :, place // 6, place % 6] *= -1
        changed = (encoder(other) != before).any(2).any(0)
        assert not changed[: place + 1].any(), f"place {place} leaks into itself or earlier places"
        assert place == 35 or changed[place + 1 :].any(), f"place {place} reaches nobody"


def test_causal_pixels_depend_on_earlier_pixels_only_in_bf16_and_recomputed() -> None:
    """Outputs, and the gradients of weights, which come from what is computed once more for the backward pass."""
    encoder = pixels(causal=True, pos_embed="learned_1d", activation_checkpointing=True).train()
    weights = [block.attn.qkv.weight for block in encoder.blocks]
    passes: list[int] = []
    encoder.blocks[0].register_forward_pre_hook(lambda *_: passes.append(1))

    def step(pixels: torch.Tensor, known: int) -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            tokens = encoder(pixels)[:, :known]
        return [tokens.detach(), *torch.autograd.grad(tokens.float().square().sum(), weights)]

    one = torch.randn(1, 3, 6, 6)
    for changed in range(36):
        other = one.clone()
        other.view(3, 36)[:, changed] *= -1
        for before, after in zip(step(one, changed + 1), step(other, changed + 1), strict=True):
            assert before.any()
            assert torch.equal(after, before)
    assert len(passes) == 36 * 2 * 2


@torch.no_grad()
def test_decoding_beyond_the_image_or_with_other_images_is_refused() -> None:
    encoder = pixels(causal=True)
    kv_caches = encoder.init_kv_cache(2)
    with pytest.raises(ValueError, match=r"1 images and 4 positions, but this cache is for 2 images of 36"):
        encoder.decode(torch.zeros(1, 3, dtype=torch.long), kv_caches)
    encoder.decode(torch.zeros(2, 35, dtype=torch.long), kv_caches)
    with pytest.raises(ValueError, match="2 images and 37 positions"):
        encoder.decode(torch.zeros(2, 1, dtype=torch.long), kv_caches)


def test_igpts_initialization_is_that_of_its_released_code() -> None:
    torch.manual_seed(0)
    encoder = ViTEncoder(preset("igpt_small", depth=4, width=256, heads=4))
    deviation = {name: float(parameter.std()) for name, parameter in encoder.named_parameters() if parameter.ndim > 1}
    assert deviation["blocks.2.attn.qkv.weight"] == pytest.approx(256**-0.5, rel=0.02)
    assert deviation["blocks.2.attn.proj.weight"] == pytest.approx((256 * 4) ** -0.5, rel=0.02)
    assert deviation["blocks.2.mlp.fc1.weight"] == pytest.approx(0.02, rel=0.02)
    assert deviation["pos_embed"] == pytest.approx(0.01, rel=0.02)
    assert deviation["patch_embed.embed.weight"] == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize("patch", [4, 16])
@pytest.mark.parametrize("tokens", ["patch", "shifted_patch"])
def test_a_projection_of_patches_starts_as_torch_starts_a_convolution(tokens: str, patch: int) -> None:
    """As in timm and DINO, whose loops over linear maps pass it by; the other maps are of deviation 0.02."""
    torch.manual_seed(0)
    encoder = ViTEncoder(EncoderSettings(image_size=32, patch=patch, width=192, depth=1, heads=3, tokens=tokens))
    projection = encoder.patch_embed.proj
    inputs = projection.weight[0].numel()
    for parameter in (projection.weight, projection.bias):
        bound = inputs**-0.5
        assert 0.95 * bound < float(parameter.detach().abs().max()) <= bound
        assert float(parameter.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.1)
    assert float(encoder.blocks[0].mlp.fc1.weight.detach().std()) == pytest.approx(0.02, rel=0.02)
    assert not encoder.blocks[0].mlp.fc1.bias.any()


def test_xavier_reaches_the_projection_of_patches() -> None:
    encoder = ViTEncoder(EncoderSettings(image_size=32, patch=4, width=192, depth=1, heads=3, init="xavier"))
    for weight, bound in ((encoder.patch_embed.proj.weight, (6 / (48 + 192)) ** 0.5),
                          (encoder.blocks[0].attn.qkv.weight, (6 / (192 + 3 * 192)) ** 0.5)):  # fmt: skip
        assert 0.99 * bound < float(weight.detach().abs().max()) <= bound
    assert not encoder.patch_embed.proj.bias.any()


@pytest.mark.parametrize("initialization", ["normal", "xavier"])
def test_tokens_and_tables_start_small_and_different(initialization: str) -> None:
    encoder = ViTEncoder(EncoderSettings(
        image_size=32, patch=4, width=192, depth=1, heads=3, registers=4, mask_token=True, pos_embed="learned_2d",
        prefix_positions="all", init=initialization,
    ))  # fmt: skip
    for name in ("cls_token", "reg_token", "mask_token", "pos_embed_prefix", "pos_embed_row", "pos_embed_column"):
        assert float(getattr(encoder, name).detach().std()) == pytest.approx(0.02, rel=0.2), name


def test_unshifted_pixels_see_themselves_and_later_ones() -> None:
    encoder = pixels()
    other = images(6, 6).clone()
    other[:, :, 5, 5] *= -1
    assert (encoder(other) != encoder(images(6, 6))).any(2).all()


@torch.no_grad()
@pytest.mark.parametrize("tokens", TOKENS)
def test_channels_are_free(tokens: str) -> None:
    for channels in (1, 2, 5):
        encoder = make(hybrid_backbone="resnet18", tokens=tokens, channels=channels)
        assert encoder(images(channels=channels)).shape == (2, 17, 48)


@torch.no_grad()
def test_shifted_patches_see_half_a_patch_around_themselves() -> None:
    encoder = make(tokens="shifted_patch")
    seen = []
    for row in range(32):
        other = images().clone()
        other[:, :, row] += 1
        before, after = (encoder.patch_embed(x)[:, 5] for x in (images(), other))  # rows 8 to 16 of the image
        seen.append(bool((before != after).any()))
    assert [row for row, is_seen in enumerate(seen) if is_seen] == list(range(4, 20))


@torch.no_grad()
def test_a_conv_stem_doubles_its_channels_until_they_are_the_width() -> None:
    convolutions = [layer for layer in make(tokens="conv_stem").patch_embed.stem if isinstance(layer, torch.nn.Conv2d)]
    assert [(layer.in_channels, layer.out_channels) for layer in convolutions] == [(3, 12), (12, 24), (24, 48)]
    assert all(layer.stride == (2, 2) and layer.kernel_size == (3, 3) for layer in convolutions)


def test_convolutions_look_beyond_their_patch() -> None:
    for tokens in ("conv_stem", "mbconv", "hybrid"):
        encoder = make(hybrid_backbone="resnet18", tokens=tokens)
        other = images().clone()
        other[:, :, 7] += 1  # the last row above patch 5
        assert (encoder.patch_embed(images())[:, 5] != encoder.patch_embed(other)[:, 5]).any(), tokens


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"locality_self_attention": True}, {"pos_embed": "relative_bias"},
{"pos_embed": "rotary_2d"}, {"pos_embed": "rotary_2d_normalized", "key_bias": False},
                                     {"qk_norm": True}, {"causal": True, "pos_embed": "learned_1d"}])  # fmt: skip
def test_attention_weights_give_the_output_of_the_fast_path(options: dict) -> None:
    encoder = make(**options)
    (block,) = encoder.intermediates(images(), [2], attention=True)
    attention = block.attention
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 4, 17))
    _, places = encoder.embed(images())
    inside = encoder.blocks[1].attn
    normed = encoder.blocks[1].norm1(encoder.layers(images(), [1])[0])
    _, _, value = inside.heads_of(normed, places)
    slow = inside.proj((attention @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(slow, inside(normed, places), atol=1e-5, rtol=1e-4)
    if options.get("locality_self_attention"):
        assert (attention.diagonal(dim1=-2, dim2=-1) == 0).all()
    if options.get("causal"):
        assert (attention.triu(1) == 0).all()


def test_locality_learns_its_temperature() -> None:
    encoder = make(locality_self_attention=True)
    encoder(images()).sum().backward()
    assert encoder.blocks[0].attn.scale.grad.abs().max() > 0
    assert "blocks.0.attn.scale" not in make().state_dict()


@torch.no_grad()
def test_registers_stand_between_class_token_and_patches_and_are_left_out_of_the_mean() -> None:
    encoder = make(registers=2, pooling="mean")
    tokens = encoder(images())
    assert tokens.shape == (2, 1 + 2 + 16, 48)
    torch.testing.assert_close(encoder.features(images()), tokens[:, 3:].mean(1))
    before, _ = encoder.embed(images())
    encoder.reg_token += 1
    after, _ = encoder.embed(images())
    assert (before != after).any(2)[0].nonzero().flatten().tolist() == [1, 2]


@torch.no_grad()
@pytest.mark.parametrize(("kind", "rows"), [("none", 0), ("class", 1), ("all", 3)])
def test_prefix_tokens_have_positions_as_asked(kind: str, rows: int) -> None:
    encoder = make(registers=2, prefix_positions=kind)
    assert encoder.pos_embed.shape[1] == rows + 16
    tokens, _ = encoder.embed(images())
    bare = torch.cat([encoder.cls_token, encoder.reg_token], 1)[0]
    assert ((tokens[0, :3] - bare).abs().amax(1) > 0).tolist() == [i < rows for i in range(3)]


@torch.no_grad()
def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean() -> None:
    encoder = make(drop_path=0.5, depth=2).train()
    noise = torch.ones(4, 2)
    noise[2:, 0] = 0.0  # the first image skips both branches of the second block
    tokens = encoder(images(), path_noise=noise)
    one = encoder.norm(encoder.eval().layers(images(), [1])[0])
    torch.testing.assert_close(tokens[0], one[0])
    assert (tokens[1] - one[1]).abs().max() > 1e-3
    branch = torch.ones(20_000, 1, 1)
    noise = torch.rand(4, 20_000, generator=torch.Generator().manual_seed(0))
    kept = drop_path(branch, encoder.train()._path_scale(branch, noise)[2:], 0)
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    assert abs(kept.mean() - 1) < 0.02


@torch.no_grad()
def test_dropout_acts_in_training_only() -> None:
    encoder = make(dropout=0.5)
    assert torch.equal(encoder(images()), encoder(images()))
    encoder.train()
    assert not torch.equal(encoder(images()), encoder(images()))


@torch.no_grad()
def test_tokens_are_dropped_before_the_first_block() -> None:
    encoder = make(dropout=0.5)
    whole, _ = encoder.embed(images())
    dropped, _ = encoder.train().embed(images())
    is_kept = dropped != 0
    assert is_kept.double().mean() == pytest.approx(0.5, abs=0.1)
    torch.testing.assert_close(dropped[is_kept], 2 * whole[is_kept])


@torch.no_grad()
@pytest.mark.parametrize("silent", ["attn.proj", "mlp.fc2"])
def test_both_branches_of_a_block_drop_channels(silent: str) -> None:
    block = make(dropout=0.5).blocks[0].train()
    for parameter in block.get_submodule(silent).parameters():
        parameter.zero_()  # what the other branch adds is left alone
    tokens = torch.randn(4, 20, 48)
    share = ((block(tokens) - tokens) == 0).double().mean()
    assert share == pytest.approx(0.5, abs=0.05)


@torch.no_grad()
@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_an_mlp_drops_what_its_second_map_takes(mlp: str) -> None:
    """As timm, torch and the papers' code do: the kept units are doubled, in training only."""
    part, taken = make(dropout=0.5, mlp=mlp).blocks[0].mlp, []
    part.fc2.register_forward_pre_hook(lambda module, inputs: taken.append(inputs[0]))
    tokens = torch.randn(4, 50, 48)
    part(tokens)
    part.train()(tokens)
    whole, dropped = taken
    is_kept = dropped != 0
    assert is_kept.double().mean() == pytest.approx(0.5, abs=0.03)
    torch.testing.assert_close(dropped[is_kept], 2 * whole[is_kept])


@pytest.mark.parametrize(("depth", "rates"), [(1, [0.3]), (2, [0.0, 0.3]), (4, [0.0, 0.1, 0.2, 0.3])])
def test_stochastic_depth_rises_from_the_first_block_to_the_last(depth: int, rates: list[float]) -> None:
    encoder = make(drop_path=0.3, depth=depth)
    assert [block.drop_rate for block in encoder.blocks] == pytest.approx(rates)
    noise = torch.full((2 * depth, 2), 0.299)  # below the last block's rate alone
    dropped = encoder.train()(images(), path_noise=noise)
    before_last = encoder.eval().layers(images(), [depth - 1])[0]
    torch.testing.assert_close(dropped, encoder.norm(through(encoder, before_last, noise, depth)))


@torch.no_grad()
def test_the_branches_of_a_block_are_dropped_one_by_one() -> None:
    block, tokens = make(drop_path=0.5, depth=1).blocks[0], torch.randn(4, 5, 48)
    kept = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 2.0, 0.0, 2.0]])[:, :, None, None]  # twice what is not dropped
    once = tokens + kept[0] * block.attn(block.norm1(tokens))
    twice = once + kept[1] * block.mlp(block.norm2(once))
    torch.testing.assert_close(block(tokens, path_scale=kept[:, :, 0, 0]), twice)


def through(encoder: ViTEncoder, before_last: torch.Tensor, noise: torch.Tensor, depth: int) -> torch.Tensor:
    """The last block skipped; the blocks before it as the noise has it: all kept, their branches over 1 - rate."""
    if depth <= 2:
        return before_last
    tokens, places = encoder.embed(images())
    for block, rate in zip(encoder.blocks[:-1], (0.0, 0.1, 0.2), strict=True):
        tokens = tokens + block.attn(block.norm1(tokens), places) / (1 - rate)
        tokens = tokens + block.mlp(block.norm2(tokens)) / (1 - rate)
    return tokens


def test_stochastic_depth_is_drawn_where_no_numbers_are_given() -> None:
    encoder = make(drop_path=0.5, depth=1).train()
    one, other = encoder(images()), encoder(images())
    assert not torch.equal(one, other)
    assert torch.equal(encoder.eval()(images()), encoder(images()))


@torch.no_grad()
@pytest.mark.parametrize(("antialias", "offset"), [(True, 0.0), (False, 0.0), (False, 0.1)])
def test_weights_resized_once_are_those_that_the_encoder_stretches_each_time(antialias: bool, offset: float) -> None:
    encoder = make(interpolate_antialias=antialias, interpolate_offset=offset)
    for size in (16, 48):
        settings = replace(encoder.settings, image_size=size)
        resized = ViTEncoder(settings).eval()
        resized.load_state_dict(resize_weights(encoder.state_dict(), encoder.settings, settings))
        torch.testing.assert_close(resized(images(size, size)), encoder(images(size, size)))


def test_pooling_options_differ_and_attention_pool_sees_all_tokens() -> None:
    encoder = make(pooling="attention", fc_norm=True)
    features = {kind: encoder.features(images(), pooling=kind) for kind in ("class", "mean", "attention")}
    for one, other in itertools.combinations(features.values(), 2):
        assert not torch.allclose(one, other)
    tokens = encoder(images())
    for place in (0, 16):
        moved = tokens.clone()
        moved[:, place] += 1
        assert not torch.allclose(encoder.attn_pool(moved), encoder.attn_pool(tokens))
    normed = features["mean"]
    assert abs(normed.mean()) < 0.5
    torch.testing.assert_close(normed, encoder.fc_norm(tokens[:, 1:].mean(1)))


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["class", "mean", "attention"])
def test_the_pooled_vector_is_normalized_where_asked_whatever_the_pooling(pooling: str) -> None:
    encoder = make(pooling=pooling, fc_norm=True, final_norm=False)
    tokens = encoder(images())
    pooled = {"class": tokens[:, 0], "mean": tokens[:, 1:].mean(1)}.get(pooling)
    pooled = encoder.attn_pool(tokens) if pooled is None else pooled
    torch.testing.assert_close(encoder.features(images()), encoder.fc_norm(pooled))


def test_the_query_of_an_attention_pool_starts_at_random_and_not_at_zero() -> None:
    settings = EncoderSettings(image_size=32, patch=8, width=256, depth=1, heads=4, pooling="attention")
    assert float(ViTEncoder(settings).attn_pool.query.std()) == pytest.approx(256**-0.5, rel=0.3)


def test_class_pooling_without_a_class_token_is_refused() -> None:
    with pytest.raises(ValueError, match="Set pooling to mean"):
        EncoderSettings(class_token=False)
    with pytest.raises(ValueError, match="no class token"):
        make(class_token=False, pooling="mean").features(images(), pooling="class")


@torch.no_grad()
def test_features_come_from_the_saved_layer() -> None:
    encoder = make(feature_layer=2, feature_norm="next", pooling="mean")
    (tokens,) = encoder.layers(images(), [2])
    torch.testing.assert_close(encoder.features(images()), encoder.blocks[2].norm1(tokens)[:, 1:].mean(1))
    last = encoder.features(images(), layer=3)
    torch.testing.assert_close(last, encoder(images())[:, 1:].mean(1))
    with pytest.raises(ValueError, match="blocks 1 to 3"):
        encoder.layers(images(), [4])
    with pytest.raises(ValueError, match=r"layers \[0\] do not exist"):
        list(encoder.intermediates(images(), [0, 1], attention=True))


def test_checkpointing_changes_memory_and_not_gradients() -> None:
    gradients, kept = [], []
    for checkpointing in (False, True):
        encoder = make(activation_checkpointing=checkpointing, drop_path=0.5).train()
        noise = torch.rand(6, 2, generator=torch.Generator().manual_seed(0))
        saved: dict[int, int] = {}  # elements of each tensor that is kept for the backward pass
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, saved=saved: saved.update({x.data_ptr(): x.numel()}) or x, lambda x: x
        ):  # fmt: skip
            loss = encoder(images(), path_noise=noise).square().sum()
        loss.backward()
        gradients.append(encoder.patch_embed.proj.weight.grad)
        kept.append(sum(saved.values()))
    assert torch.equal(*gradients)
    assert kept[1] < kept[0] / 3


@torch.no_grad()
def test_mlp_and_norm_options_compute_what_they_say() -> None:
    x = torch.randn(2, 5, 48)
    swiglu = make(mlp="swiglu").blocks[0].mlp
    gate, value = (x @ swiglu.fc1.weight.T + swiglu.fc1.bias).chunk(2, -1)
    expected = (torch.nn.functional.silu(gate) * value) @ swiglu.fc2.weight.T + swiglu.fc2.bias
    torch.testing.assert_close(swiglu(x), expected, atol=1e-5, rtol=1e-4)
    assert swiglu.fc2.in_features == 128
    rms = make(norm="rms").norm
    torch.testing.assert_close(rms(x), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * rms.weight)
    scaled = make(layer_scale=1e-5).blocks[0]
    assert scaled.ls1.gamma.shape == (48,)
    assert not any("bias" in name for name, _ in make(bias=False, norm="rms").blocks.named_parameters())


@torch.no_grad()
def test_bf16_path_on_the_cpu_agrees_with_float32() -> None:
    for options in (
        {},
        {"causal": True},
        {"pos_embed": "relative_bias"},
        {"qk_norm": True, "pos_embed": "relative_bias"},
    ):
        encoder = make(**options)
        with torch.autocast("cpu", torch.bfloat16):
            half = encoder(images())
            assert all(tokens.dtype == torch.float32 for tokens in encoder.layers(images(), [0, 1, 3]))
        assert (half.float() - encoder(images())).abs().mean() < 0.05


MASKS = [{}, {"causal": True}, {"locality_self_attention": True}, {"pos_embed": "relative_bias"}]


@pytest.mark.parametrize(("fused_from", "heads"), [(1, 4), (10_000, 4), (10_000, 12)])  # the last keeps no weights
@pytest.mark.parametrize("options", MASKS)
def test_all_ways_of_attention_in_bf16_give_the_outputs_and_gradients_of_float32(
    options: dict, fused_from: int, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sslvit.models.transformer.FUSED_BF16_TOKENS", fused_from)
    attention = make(**options, heads=heads).blocks[0].attn.train()
    layout = TokenLayout((4, 4), 1)
    tokens = torch.randn(2, 17, 48, generator=torch.Generator().manual_seed(2))

    def run() -> list[torch.Tensor]:
        given = tokens.clone().requires_grad_()
        mixed = attention(given, layout)
        gradients = torch.autograd.grad(mixed.float().square().sum(), [given, *attention.parameters()])
        return [mixed.float(), *gradients]

    expected = run()
    with torch.autocast("cpu", torch.bfloat16):
        found = run()
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() < 0.02 * other.norm()


@pytest.mark.parametrize("options", [{}, {"causal": True}])
@pytest.mark.parametrize(("heads", "keeps"), [(4, True), (12, False)])
def test_weights_larger_than_their_queries_keys_and_values_are_not_kept_for_the_backward_pass(
    options: dict, heads: int, keeps: bool
) -> None:
    attention, kept = make(**options, heads=heads).blocks[0].attn.train(), []
    tokens = torch.randn(2, 17, 48, requires_grad=True)
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda x: x),
    ):
        attention(tokens, TokenLayout((4, 4), 1))
    assert (2 * heads * 17 * 17 in kept) == keeps


@pytest.mark.parametrize("options", [{}, {"causal": True}])
def test_attention_in_chunks_of_a_batch_is_that_of_the_whole(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    attention, sizes = make(**options, heads=12).blocks[0].attn.train(), []
    tokens = torch.randn(5, 17, 48, generator=torch.Generator().manual_seed(2))
    weights = transformer._weights
    monkeypatch.setattr(transformer, "_weights", lambda query, *rest: sizes.append(len(query)) or weights(query, *rest))

    def run(most: int) -> list[torch.Tensor]:
        monkeypatch.setattr(transformer, "WEIGHTS_AT_ONCE", most)
        given = tokens.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            mixed = attention(given, TokenLayout((4, 4), 1))
        return [mixed, *torch.autograd.grad(mixed.float().square().sum(), [given, *attention.parameters()])]

    whole = run(2**21)
    assert sizes == [5, 5]  # forward and backward
    sizes.clear()
    parts = run(2 * 12 * 17 * 17 * 2)  # bytes of two images, in bf16
    assert sizes == [2, 2, 1] * 2
    for one, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(one, other)
    run(1)
    assert sizes[6:] == [1] * 10  # at least one image


@pytest.mark.parametrize(
    ("tokens", "options", "learns", "written"),
    [
        (577, {}, True, True), (577, {"causal": True}, True, True), (577, {}, False, False),
        (1024, {}, True, False), (1024, {"causal": True}, True, False),
        (1024, {"locality_self_attention": True}, True, False),
        (1024, {"pos_embed": "relative_bias"}, True, True), (1024, {"pos_embed": "relative_bias"}, False, True),
    ],
)  # fmt: skip
def test_attention_in_bf16_on_the_cpu_takes_the_faster_way(
    tokens: int, options: dict, learns: bool, written: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused: list[torch.Size] = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def attend(query: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        fused.append(query.shape)
        return kernel(query, *args, **kwargs)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", attend)
    attention = make(width=8, heads=1, depth=1, **options).blocks[0].attn
    given, layout = torch.randn(1, tokens, 8), TokenLayout((32, 32), tokens - 1024)
    if tokens < 1024:
        layout = TokenLayout((24, 24), 1)
    with torch.set_grad_enabled(learns):
        attention(given, layout)
        assert len(fused) == 1, "float32 has its fused kernel everywhere"
        with torch.autocast("cpu", torch.bfloat16):
            attention(given, layout)
    assert len(fused) == (1 if written else 2)


def test_turning_heads_takes_each_pair_by_its_angle_in_the_heads_precision() -> None:
    """float32 to the last bit as pair by pair, gradients too; in bf16 within its rounding."""
    generator = torch.Generator().manual_seed(0)
    angles = 20 * torch.rand(1, 1, 9, 8, generator=generator)
    heads = torch.randn(2, 3, 9, 16, generator=generator)
    cos, sin = angles.cos(), angles.sin()

    def by_pairs(heads: torch.Tensor) -> torch.Tensor:
        first, second = heads.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    expected, back = torch.autograd.functional.vjp(by_pairs, heads, heads.flip(0))
    found, found_back = torch.autograd.functional.vjp(lambda heads: rotate(heads, (cos, sin)), heads, heads.flip(0))
    assert torch.equal(found, expected)
    assert torch.equal(found_back, back)
    half = rotate(heads.bfloat16(), (cos, sin))
    assert half.dtype == torch.bfloat16
    assert (half.float() - expected).norm() < 0.004 * expected.norm()  # 0.0027 here, of which 0.0017 is the heads'


@pytest.mark.parametrize(
    ("name", "millions"),
    [("vit_tiny", 5.5), ("vit_small", 21.7), ("vit_base", 85.8), ("vit_large", 303.3), ("vit_huge", 630.9),
     ("igpt_small", 76), ("igpt_medium", 455), ("igpt_large", 1362)],
)  # fmt: skip
def test_presets_have_the_published_number_of_parameters(name: str, millions: float) -> None:
    """Dosovitskiy et al. 2021, table 1, without the classifier; iGPT's README, with its output matrix."""
    settings = preset(name)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in ViTEncoder(settings).parameters())
    head = 512 * settings.width if name.startswith("igpt") else 0
    assert (count + head) / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize("patch", [4, 8, 14, 16])
def test_presets_take_every_patch(patch: int) -> None:
    with torch.device("meta"):
        encoder = ViTEncoder(preset("vit_tiny", patch=patch, image_size=16 * patch))
        assert encoder(torch.zeros(1, 3, 16 * patch, 16 * patch)).shape == (1, 257, 192)


def test_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="vit_tiny, vit_small"):
        preset("vit_tny")
    assert set(PRESETS) >= {"vit_huge", "igpt_large"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 50, "heads": 4}, r"4 heads do not divide width 50"),
        ({"tokens": "pixel", "patch": 1, "image_size": 8}, "pixel sequences have no prefix tokens"),
        ({"tokens": "pixel", "class_token": False, "pooling": "mean"}, "1 pixel wide"),
        ({"tokens": "conv_stem", "patch": 12, "image_size": 24}, "power of two"),
        ({"tokens": "hybrid", "patch": 2}, "4, 8, 16 and 32"),
        ({"causal": True, "locality_self_attention": True}, "either causal or locality"),
        ({"pos_embed": "sincos_2d", "width": 50, "heads": 5}, "multiple of 4"),
        ({"pos_embed": "rotary_2d", "width": 60, "heads": 10}, "multiples of 4"),
        ({"pos_embed": "rotary_2d_normalized", "width": 60, "heads": 10}, "rotary_2d_normalized .* multiples of 4"),
        ({"mean": [0.5]}, "1 values for 3 channels"),
        ({"feature_layer": 13}, r"outside 1\.\.12"),
        ({"image_size": [1, 2, 3]}, "must be one side or"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EncoderSettings(**changes)


@pytest.mark.parametrize(("antialias", "offset"), [(True, 0.0), (False, 0.1)])
def test_repeatable_kernels_stretch_positions_to_the_same_values_and_gradients(antialias: bool, offset: float) -> None:
    """On a GPU the gradient of interpolation has no repeatable kernel; a product with its matrix has."""
    torch.manual_seed(0)
    results = []
    table, weights = torch.randn(20, 6, requires_grad=True), torch.randn(6, 6)
    for is_repeatable in (False, True):
        table.grad = None
        torch.use_deterministic_algorithms(is_repeatable)
        try:
            stretched = resample_table(table, (4, 5), (3, 2), antialias, offset)
        finally:
            torch.use_deterministic_algorithms(False)
        (stretched * weights).sum().backward()
        results.append((stretched.detach(), table.grad, stretched.grad_fn.next_functions))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])
    assert "upsample" in graph_of(results[0][2])
    assert "upsample" not in graph_of(results[1][2])


def graph_of(functions) -> str:
    """The names of all operations behind a result."""
    return " ".join(f"{node.name().lower()} {graph_of(node.next_functions)}" for node, _ in functions if node)


@pytest.mark.parametrize(
    ("width", "ratio", "hidden"), [(208, 4.1, 853), (24, 4.1, 98), (192, 4.0, 768), (10, 2.55, 26)]
)
def test_the_hidden_width_of_an_mlp_is_rounded_not_cut(width: int, ratio: float, hidden: int) -> None:
    assert EncoderSettings(width=width, heads=1, mlp_ratio=ratio).mlp_width == hidden


def test_every_hidden_width_comes_back_from_its_ratio() -> None:
    settings = EncoderSettings(width=208, heads=1)
    for width in (24, 208, 387, 1280):
        for hidden in range(width, 5 * width):
            settings.width, settings.mlp_ratio = width, hidden / width
            assert settings.mlp_width == hidden
