"""Tokenizers: image -> a sequence of tokens on an (h, w) grid, row by row.

Every tokenizer is made from EncoderSettings, takes `images` ('b c h w') and `visible` ('b k' patch indices, or None for
all) and returns 'b k d'. If a token depends on its own patch alone, only the visible ones are computed.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from sslvit.files import brief
from sslvit.palette import colors_of, nearest_color, uniform_palette
from sslvit.plugins import find_plugin
from sslvit.settings import EncoderSettings

FREQUENCY = 2.0  # radians per unit of color, for colors initialized as random Fourier features
AMPLITUDE = 0.3


def cut_patches(images: Float[Tensor, "b c h w"], patch: int) -> Float[Tensor, "b n cpp"]:
    """Cut images into patches flattened as (channel, row, column), the order of a convolution's weight."""
    return rearrange(images, "b c (rows p) (cols q) -> b (rows cols) (c p q)", p=patch, q=patch)


def gather_tokens(tokens: Shaped[Tensor, "b n d"], visible: Int[Tensor, "b k"] | None) -> Shaped[Tensor, "b k d"]:
    """The tokens of the visible patches, in the listed order; all tokens for None."""
    if visible is None:
        return tokens
    return tokens.gather(1, visible[:, :, None].expand(-1, -1, tokens.shape[2]))


class PatchTokens(nn.Module):
    """A linear map of each patch (Dosovitskiy et al. 2021, section 3.1), stored as a convolution (d, c, p, p)."""

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()
        self.patch = settings.patch
        self.proj = nn.Conv2d(
            settings.channels, settings.width, settings.patch, settings.patch, bias=settings.patch_bias
        )

    def forward(self, images: Float[Tensor, "b c h w"], visible: Int[Tensor, "b k"] | None = None) -> Tensor:
        """The tokens of the visible patches."""
        patches = gather_tokens(cut_patches(images, self.patch), visible)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class ShiftedPatchTokens(nn.Module):
    """Patches of the image and four copies shifted diagonally by half a patch (Lee et al. 2021, section 3.1)."""

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()
        self.patch = settings.patch
        self.norm = nn.LayerNorm(5 * settings.channels * settings.patch**2)
        self.proj = nn.Conv2d(5 * settings.channels, settings.width, settings.patch, settings.patch)

    def forward(self, images: Float[Tensor, "b c h w"], visible: Int[Tensor, "b k"] | None = None) -> Tensor:
        """The tokens of the visible patches."""
        half = self.patch // 2
        height, width = images.shape[2:]
        padded = F.pad(images, (half, half, half, half))
        shifted = [
            padded[:, :, top : top + height, left : left + width] for top in (0, 2 * half) for left in (0, 2 * half)
        ]
        patches = gather_tokens(cut_patches(torch.cat([images, *shifted], 1), self.patch), visible)
        return F.linear(self.norm(patches), self.proj.weight.flatten(1), self.proj.bias)


class ConvStemTokens(nn.Module):
    """Early convolutions (Xiao et al. 2021): 3 x 3 of stride 2 up to a total stride of `patch`, then a 1 x 1.

    Receptive fields overlap, so all tokens are computed before the visible ones are selected.
    """

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()
        steps = int(math.log2(settings.patch))
        widths = [max(settings.width // 2 ** (steps - i), 8) for i in range(1, steps + 1)]
        layers: list[nn.Module] = []
        for before, after in zip([settings.channels, *widths], widths, strict=False):
            layers += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.stem = nn.Sequential(*layers)
        self.proj = nn.Conv2d(widths[-1], settings.width, 1)

    def forward(self, images: Float[Tensor, "b c h w"], visible: Int[Tensor, "b k"] | None = None) -> Tensor:
        """The tokens of the visible patches."""
        tokens = self.proj(self.stem(images))
        return gather_tokens(rearrange(tokens, "b d rows cols -> b (rows cols) d"), visible)


class MBConv(nn.Module):
    """A pre-norm inverted bottleneck with squeeze and excitation (CoAtNet, Dai et al. 2021, appendix A.1).

    The expansion ratio is 4; the depthwise convolution has the stride.
    """

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        inside = 4 * before
        self.expand = nn.Sequential(
            nn.BatchNorm2d(before), nn.Conv2d(before, inside, 1, bias=False), nn.BatchNorm2d(inside), nn.GELU(),
            nn.Conv2d(inside, inside, 3, stride, 1, groups=inside, bias=False), nn.BatchNorm2d(inside), nn.GELU(),
        )  # fmt: skip
        self.excite = nn.Sequential(
            nn.Conv2d(inside, max(before // 4, 1), 1), nn.GELU(), nn.Conv2d(max(before // 4, 1), inside, 1),
            nn.Sigmoid(),
        )  # fmt: skip
        self.project = nn.Conv2d(inside, after, 1)
        self.pool = nn.MaxPool2d(3, 2, 1) if stride == 2 else nn.Identity()
        self.shortcut = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Tensor:
        """The feature map, at half the size if the stride is 2."""
        inside = self.expand(x)
        inside = inside * self.excite(inside.mean((2, 3), keepdim=True))
        return self.shortcut(self.pool(x)) + self.project(inside)


class MBConvTokens(nn.Module):
    """The convolutional stages of CoAtNet (Dai et al. 2021, section 2.2), one token per cell of the last feature map.

    Two 3 x 3 convolutions at half the size, then stages of two MBConv blocks, each at half the size of the previous
    stage and twice as wide, up to a total stride of `patch`. With relative_bias positions, the encoder is a CoAtNet.
    """

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()
        steps = int(math.log2(settings.patch))
        widths = [max(settings.width // 2 ** (steps - i), 8) for i in range(1, steps)] + [settings.width]
        self.stem = nn.Sequential(
            nn.Conv2d(settings.channels, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.GELU(),
            nn.Conv2d(widths[0], widths[0], 3, 1, 1),
        )  # fmt: skip
        self.stages = nn.Sequential(
            *(
                nn.Sequential(MBConv(before, after, 2), MBConv(after, after, 1))
                for before, after in itertools.pairwise(widths)
            )
        )

    def forward(self, images: Float[Tensor, "b c h w"], visible: Int[Tensor, "b k"] | None = None) -> Tensor:
        """The tokens of the visible patches."""
        tokens = self.stages(self.stem(images))
        return gather_tokens(rearrange(tokens, "b d rows cols -> b (rows cols) d"), visible)


class HybridTokens(nn.Module):
    """The feature map of a ResNet, one token per cell (Dosovitskiy et al. 2021, section 3.1, "Hybrid Architecture")."""

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()
        from torchvision.models import get_model  # takes seconds to import, and only hybrids need it

        resnet = get_model(settings.hybrid_backbone, weights=None)
        if settings.channels != 3:
            resnet.conv1 = nn.Conv2d(settings.channels, 64, 7, 2, 3, bias=False)
        stages = [resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4]
        stages = stages[: int(math.log2(settings.patch)) - 1]
        self.cnn = nn.Sequential(resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool, *stages)
        last = [module for module in stages[-1].modules() if isinstance(module, nn.BatchNorm2d)][-1]
        self.proj = nn.Conv2d(last.num_features, settings.width, 1)

    def forward(self, images: Float[Tensor, "b c h w"], visible: Int[Tensor, "b k"] | None = None) -> Tensor:
        """The tokens of the visible patches."""
        tokens = self.proj(self.cnn(images))
        return gather_tokens(rearrange(tokens, "b d rows cols -> b (rows cols) d"), visible)


class PixelTokens(nn.Module):
    """One token per pixel: the learned embedding of the nearest palette color (iGPT, Chen et al. 2020, section 3.2).

    In a causal encoder, the sequence is shifted right by a learned start token: the input at position i is pixel i - 1,
    so that nothing computed at position i depends on pixel i.
    """

    palette: Float[Tensor, "colors c"]
    mean: Float[Tensor, "c 1 1"]
    std: Float[Tensor, "c 1 1"]

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()
        is_uniform = settings.palette == "uniform"
        palette = uniform_palette(settings.channels) if is_uniform else torch.tensor(settings.palette)
        self.shifted = settings.causal
        self.register_buffer("palette", palette, persistent=False)
        self.register_buffer("mean", torch.tensor(settings.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(settings.std).view(-1, 1, 1), persistent=False)
        self.embed = nn.Embedding(len(palette), settings.width)
        if self.shifted:
            self.start_token = nn.Parameter(torch.zeros(1, 1, settings.width))

    @torch.no_grad()
    def start_from_colors(self) -> None:
        """Initialize similar colors with similar embeddings: random Fourier features (Rahimi and Recht 2007)."""
        turns = torch.randn(self.palette.shape[1], self.embed.embedding_dim) * FREQUENCY
        phases = torch.rand(self.embed.embedding_dim) * 2 * math.pi
        self.embed.weight.copy_((self.palette @ turns + phases).cos() * AMPLITUDE)

    def quantize(self, images: Float[Tensor, "b c h w"]) -> Int[Tensor, "b n"]:
        """Palette index of every pixel of normalized images, row by row."""
        return nearest_color((images * self.std + self.mean) * 2 - 1, self.palette).flatten(1)

    def images_of(self, indices: Int[Tensor, "b n"], grid: tuple[int, int]) -> Float[Tensor, "b c h w"]:
        """Normalized images in the palette's colors, from their indices: the inverse of `quantize`."""
        colors = colors_of(indices.unflatten(1, grid), self.palette)
        return ((colors + 1) / 2 - self.mean) / self.std

    def forward(self, images: Float[Tensor, "b c h w"], visible: Int[Tensor, "b k"] | None = None) -> Tensor:
        """The tokens of the visible pixels."""
        indices = self.quantize(images)
        return gather_tokens(self.begin(indices[:, :-1]) if self.shifted else self.embed(indices), visible)

    def begin(self, indices: Int[Tensor, "b k"]) -> Float[Tensor, "b k1 d"]:
        """The start token, followed by the tokens of the first pixels."""
        tokens = self.embed(indices)
        return torch.cat([self.start_token.expand(tokens.shape[0], -1, -1).to(tokens.dtype), tokens], 1)


TOKENIZERS: dict[str, type[nn.Module]] = {
    "patch": PatchTokens,
    "shifted_patch": ShiftedPatchTokens,
    "conv_stem": ConvStemTokens,
    "mbconv": MBConvTokens,
    "hybrid": HybridTokens,
    "pixel": PixelTokens,
}


def make_tokenizer(settings: EncoderSettings) -> nn.Module:
    """The tokenizer named by `settings.tokens`, including tokenizers of plugins.

    Raises:
        ValueError: A plugin's tokenizer is not an nn.Module, or does not make one token per patch.
    """
    if settings.tokens in TOKENIZERS:
        return TOKENIZERS[settings.tokens](settings)
    kind, name = find_plugin("encoder.tokens", settings.tokens), brief(settings.tokens)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ValueError(f"encoder.tokens: {name} is no tokenizer. It must be a class on torch.nn.Module.")
    tokenizer, (rows, columns) = kind(settings), settings.grid
    with torch.no_grad():
        found = tuple(tokenizer.eval()(torch.zeros(1, settings.channels, *settings.size), None).shape)
    if found != (expected := (1, rows * columns, settings.width)):
        raise ValueError(
            f"encoder.tokens: {name} makes {' x '.join(map(str, found))} numbers of an image, not "
            f"{' x '.join(map(str, expected))} (image, tokens, width). See sslvit.models.tokens."
        )
    return tokenizer.train()
