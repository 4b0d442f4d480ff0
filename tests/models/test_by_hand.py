"""The encoder's parts against their formulas, token by token."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_encoder import images, make

from sslvit.models import ViTEncoder
from sslvit.settings import EncoderSettings


@torch.no_grad()
@pytest.mark.parametrize("patch", [4, 8])
def test_shifted_patches_by_hand(patch: int) -> None:
    """The image, then it shifted to the four corners by half a patch, normalized together, then a linear map."""
    part = make(tokens="shifted_patch", patch=patch, image_size=16).patch_embed
    given, half = images(16, 16), patch // 2
    wide = torch.zeros(2, 3, 16 + 2 * half, 16 + 2 * half)
    wide[:, :, half : half + 16, half : half + 16] = given
    tokens = part(given)
    for place, (row, column) in enumerate(itertools.product(range(16 // patch), repeat=2)):
        top, left = row * patch + half, column * patch + half
        corners = [(0, 0), (-half, -half), (-half, half), (half, -half), (half, half)]
        cut = [wide[:, :, top + y : top + y + patch, left + x : left + x + patch] for y, x in corners]
        flat = torch.cat([piece.flatten(1) for piece in cut], 1)
        centered = flat - flat.mean(1, keepdim=True)
        normed = centered / (centered.square().mean(1, keepdim=True) + part.norm.eps).sqrt()
        normed = normed * part.norm.weight + part.norm.bias
        expected = normed @ part.proj.weight.flatten(1).T + part.proj.bias
        torch.testing.assert_close(tokens[:, place], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_pixels_find_their_colors_whatever_mean_and_deviation_the_images_are_normalized_by() -> None:
    palette = [[-0.2, 0.1, 0.0], [0.0, 0.1, 0.0], [0.0, 0.3, 0.0], [0.0, 0.1, -0.3]]  # near to each other
    options = {"tokens": "pixel", "patch": 1, "image_size": 2, "class_token": False, "prefix_positions": "none",
               "pooling": "mean", "palette": palette}  # fmt: skip
    picture = (torch.tensor(palette)[[2, 0, 3, 1]].T.reshape(1, 3, 2, 2) + 1) / 2  # in [0, 1]
    for mean, std in (([0.5] * 3, [0.5] * 3), ([0.1, 0.2, 0.9], [0.2, 0.7, 3.0])):
        part = make(**options, mean=mean, std=std).patch_embed
        normalized = (picture - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        assert part.quantize(normalized).tolist() == [[2, 0, 3, 1]]
        torch.testing.assert_close(part.images_of(torch.tensor([[2, 0, 3, 1]]), (2, 2)), normalized)


@torch.no_grad()
@pytest.mark.parametrize(("start", "are_alike"), [("fourier", True), ("normal", False)])
def test_vectors_of_near_colors_start_alike_where_asked(start: str, are_alike: bool) -> None:
    palette = [[-0.9], [-0.88], [0.8], [0.82]]
    settings = EncoderSettings(
        tokens="pixel", patch=1, image_size=2, channels=1, class_token=False, prefix_positions="none", pooling="mean",
        palette=palette, color_init=start, width=256, heads=4, depth=1,
    )  # fmt: skip
    torch.manual_seed(0)
    vectors = ViTEncoder(settings).patch_embed.embed.weight
    likeness = torch.nn.functional.cosine_similarity(vectors[:, None], vectors[None], dim=2)
    assert (likeness[0, 1] > 0.9 and likeness[2, 3] > 0.9) == are_alike
    assert abs(likeness[0, 2]) < 0.4
    # the mean square of 0.3 cos at random phases is 0.045
    assert float(vectors.square().mean()) == pytest.approx(0.045 if are_alike else 0.0004, rel=0.2)


def test_a_hybrid_is_the_resnet_that_was_asked_for_cut_at_its_stride() -> None:
    for cnn, patch, channels in (("resnet18", 8, 128), ("resnet18", 16, 256), ("resnet50", 8, 512)):
        assert make(tokens="hybrid", hybrid_backbone=cnn, patch=patch).patch_embed.proj.in_channels == channels


@torch.no_grad()
def test_a_conv_stem_by_hand() -> None:
    part = make(tokens="conv_stem", patch=4, image_size=16).patch_embed.train()
    values = images(16, 16)
    for layer in range(2):
        convolution, norm = part.stem[3 * layer], part.stem[3 * layer + 1]
        values = torch.nn.functional.conv2d(values, convolution.weight, stride=2, padding=1)
        mean, variance = values.mean((0, 2, 3), keepdim=True), values.var((0, 2, 3), keepdim=True, correction=0)
        values = (values - mean) / (variance + norm.eps).sqrt()
        values = (values * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)).clamp(min=0)
    expected = torch.einsum("bcrs,dc->brsd", values, part.proj.weight[:, :, 0, 0]).flatten(1, 2) + part.proj.bias
    torch.testing.assert_close(part(images(16, 16)), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_mbconv_tokens_by_hand() -> None:
    """CoAtNet's stages: halved and doubled from block to block, a depthwise 3 x 3 between two 1 x 1, and excitation."""
    part = make(tokens="mbconv", patch=8, image_size=16).patch_embed
    assert [stage[0].project.out_channels for stage in part.stages] == [24, 48]
    assert part.stem[0].out_channels == 12
    block, values = part.stages[0][0].train(), torch.randn(2, 12, 8, 8)

    def normalize(x: torch.Tensor, norm: torch.nn.BatchNorm2d) -> torch.Tensor:
        x = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), keepdim=True, correction=0) + norm.eps).sqrt()
        return x * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)

    functional, gelu = torch.nn.functional, torch.nn.functional.gelu
    inside = gelu(
        normalize(functional.conv2d(normalize(values, block.expand[0]), block.expand[1].weight), block.expand[2])
    )
    assert inside.shape[1] == 48
    inside = functional.conv2d(inside, block.expand[4].weight, stride=2, padding=1, groups=48)
    inside = gelu(normalize(inside, block.expand[5]))
    squeezed = functional.conv2d(inside.mean((2, 3), keepdim=True), block.excite[0].weight, block.excite[0].bias)
    assert squeezed.shape[1] == 3
    share = functional.conv2d(gelu(squeezed), block.excite[2].weight, block.excite[2].bias).sigmoid()
    expected = functional.conv2d(inside * share, block.project.weight, block.project.bias)
    pooled = functional.max_pool2d(values, 3, 2, 1)
    expected = expected + functional.conv2d(pooled, block.shortcut.weight, block.shortcut.bias)
    torch.testing.assert_close(block(values), expected, atol=1e-5, rtol=1e-4)


ATTENTION = {
    "plain": {}, "causal": {"causal": True}, "locality_self_attention": {"locality_self_attention": True},
    "bias": {"pos_embed": "relative_bias"},
    "rotary": {"pos_embed": "rotary_2d"}, "rotary, normed": {"pos_embed": "rotary_2d", "qk_norm": True},
    "rotary, normalized": {"pos_embed": "rotary_2d_normalized", "registers": 2},
    "bias, causal": {"pos_embed": "relative_bias", "causal": True, "pooling": "mean"},
    "rms": {"qk_norm": True, "norm": "rms", "norm_eps": 0.3, "layer_scale": 0.5}, "eps": {"norm_eps": 0.3},
    "no biases": {"bias": False}, "no bias of keys": {"key_bias": False, "pos_embed": "rotary_2d"},
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("kind", ATTENTION)
def test_a_block_by_hand(kind: str) -> None:
    """Head by head and token by token, from the formulas of the papers."""
    encoder = make(**ATTENTION[kind])
    settings, block = encoder.settings, encoder.blocks[1]
    given, places = encoder.embed(images())
    attended, heads, width = block.attn, settings.heads, settings.width // settings.heads

    def norm(values: torch.Tensor, module: torch.nn.Module) -> torch.Tensor:
        if settings.norm == "rms":
            return values / (values.square().mean(-1, keepdim=True) + settings.norm_eps).sqrt() * module.weight
        centered = values - values.mean(-1, keepdim=True)
        variance = centered.square().mean(-1, keepdim=True)
        return centered / (variance + settings.norm_eps).sqrt() * module.weight + module.bias

    def linear(values: torch.Tensor, module: torch.nn.Linear) -> torch.Tensor:
        result = values @ module.weight.T
        return result if module.bias is None else result + module.bias

    def turned(values: torch.Tensor) -> torch.Tensor:
        """b t e: each pair (i, i + e / 2) of a patch's channels by its angle; the class token is left alone."""
        result = values.clone()
        for token in range(settings.prefix, values.shape[1]):
            row, column = divmod(token - settings.prefix, 4)
            if settings.pos_embed == "rotary_2d_normalized":
                row, column = ((2 * (side + 0.5) / 4 - 1) * 2 * torch.pi for side in (row, column))
            for i in range(width // 2):
                quarter = width // 4
                angle = torch.tensor((row if i < quarter else column) * 100.0 ** (-(i % quarter) / quarter))
                one, two = values[:, token, i], values[:, token, i + width // 2]
                result[:, token, i] = one * angle.cos() - two * angle.sin()
                result[:, token, i + width // 2] = two * angle.cos() + one * angle.sin()
        return result

    query, key, value = linear(norm(given, block.norm1), attended.qkv).chunk(3, -1)
    if not settings.key_bias:
        key = key - attended.qkv.bias.chunk(3)[1]
    mixed = []
    for head in range(heads):
        q, k, v = (part[..., head * width : (head + 1) * width] for part in (query, key, value))
        if settings.qk_norm:
            q, k = norm(q, attended.q_norm), norm(k, attended.k_norm)
        if settings.pos_embed in ("rotary_2d", "rotary_2d_normalized"):
            q, k = turned(q), turned(k)
        scores = q @ k.transpose(1, 2) * (attended.scale[head] if settings.locality_self_attention else width**-0.5)
        for i, j in itertools.product(range(len(given[0])), repeat=2):
            if settings.pos_embed == "relative_bias" and i and j:
                (r, c), (s, d) = divmod(i - 1, 4), divmod(j - 1, 4)
                scores[:, i, j] += attended.rel_pos.table[head, r - s + 3, c - d + 3]
            if (settings.causal and j > i) or (settings.locality_self_attention and i == j):
                scores[:, i, j] = -torch.inf
        mixed.append(scores.exp() / scores.exp().sum(-1, keepdim=True) @ v)
    one = linear(torch.cat(mixed, -1), attended.proj)
    tokens = given + (one * block.ls1.gamma if settings.layer_scale else one)
    hidden = linear(norm(tokens, block.norm2), block.mlp.fc1)
    two = linear(hidden * (1 + torch.erf(hidden / 2**0.5)) / 2, block.mlp.fc2)
    expected = tokens + (two * block.ls2.gamma if settings.layer_scale else two)
    torch.testing.assert_close(block(given, places), expected, atol=1e-4, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):  # the other path
        half = block(given, places)
    assert (half.float() - expected).abs().mean() < 0.03 * expected.abs().mean()


def test_scales_start_at_what_was_asked_for() -> None:
    block = ViTEncoder(EncoderSettings(image_size=8, patch=4, width=16, depth=1, heads=2, layer_scale=0.25)).blocks[0]
    assert block.ls1.gamma.eq(0.25).all()
    assert block.ls2.gamma.eq(0.25).all()


@torch.no_grad()
def test_an_attention_pool_by_hand() -> None:
    pool = make(pooling="attention").attn_pool
    tokens, width = torch.randn(2, 9, 48), 12
    mixed = []
    for head in range(4):
        part = slice(head * width, (head + 1) * width)
        key = tokens @ pool.kv.weight[:48][part].T + pool.kv.bias[:48][part]
        value = tokens @ pool.kv.weight[48:][part].T + pool.kv.bias[48:][part]
        weights = (key @ pool.query[0, 0, part] / width**0.5).softmax(1)
        mixed.append((weights[:, :, None] * value).sum(1))
    expected = torch.cat(mixed, 1) @ pool.proj.weight.T + pool.proj.bias
    torch.testing.assert_close(pool(tokens), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_map_of_patches_holds_each_patchs_token_at_its_place() -> None:
    encoder = make(registers=2, image_size=[16, 32], feature_layer=2, feature_norm="next")
    blocks, tokens = encoder.intermediates(images(16, 32), {3, 2}, norm=True), encoder.layers(images(16, 32), [2, 3])
    for block, number, given, norm in zip(blocks, (2, 3), tokens, (encoder.blocks[2].norm1, encoder.norm), strict=True):
        found = block.patch_map()
        assert block.number == number
        assert block.attention is None
        assert found.shape == (2, 48, 2, 4)
        for row, column in itertools.product(range(2), range(4)):
            torch.testing.assert_close(found[:, :, row, column], norm(given[:, 3 + 4 * row + column]))


def test_attention_weights_are_those_of_the_block_asked_for() -> None:
    encoder = make()
    inputs: list[torch.Tensor] = []
    for block in encoder.blocks:
        block.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    with torch.no_grad():
        encoder(images())
        for layer in (1, 2, 3):
            block = encoder.blocks[layer - 1]
            expected = block.attn.weights(block.norm1(inputs[layer - 1]), None)
            (asked,) = encoder.intermediates(images(), [layer], attention=True)
            torch.testing.assert_close(asked.attention, expected)


@torch.no_grad()
@pytest.mark.parametrize("size", [[16, 32], [32, 32]])
def test_learned_rows_and_columns_are_added_at_their_place(size: list[int]) -> None:
    encoder = make(pos_embed="learned_2d", image_size=size, registers=2, prefix_positions="all")
    prefix, patches = encoder.position_table(encoder.settings.grid)
    assert torch.equal(prefix, encoder.pos_embed_prefix[0])
    for place, (row, column) in enumerate(itertools.product(range(size[0] // 8), range(size[1] // 8))):
        assert torch.equal(patches[place], encoder.pos_embed_row[row, 0] + encoder.pos_embed_column[0, column])
