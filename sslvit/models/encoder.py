"""The encoder that every task trains, every probe evaluates and every exporter writes.

    images -> tokens -> positions -> prefix tokens -> blocks -> norm

Differences between tasks are arguments (which patches are visible, which are hidden) or settings saved with the
weights (causal, the tokenizer), so the code never branches on the task.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sslvit.models.pooling import AttentionPool
from sslvit.models.positions import (
    TokenLayout,
    normalized_coordinates,
    resample_table,
    rotary_2d,
    scaled_coordinates,
    sincos_1d,
    sincos_2d,
    sincos_table,
    table_on_grid,
)
from sslvit.models.tokens import PixelTokens, gather_tokens, make_tokenizer
from sslvit.models.transformer import Block, KVCache, make_norm, run_block
from sslvit.settings import EncoderSettings
from sslvit.settings.encoder import ROTARY


@dataclass
class Intermediate:
    """The output of one block of an encoder.

    Args:
        number: the block, counted from 1; 0 stands for the input of the first block.
        tokens: prefix tokens, then patches row by row.
        layout: the positions of the tokens.
        attention: attention weights, row i those of query token i; None unless requested.
    """

    number: int
    tokens: Float[Tensor, "b t d"]
    layout: TokenLayout
    attention: Float[Tensor, "b heads t t"] | None = None

    def patch_map(self) -> Float[Tensor, "b d rows columns"]:
        """The patch tokens on their grid."""
        rows, columns = self.layout.grid
        patches = self.tokens[:, self.layout.prefix :]
        return rearrange(patches, "b (rows columns) d -> b d rows columns", rows=rows, columns=columns)


class ViTEncoder(nn.Module):
    """A vision transformer. Parameters have timm's names for all modules that timm has.

    Args:
        settings: the architecture and the input; see EncoderSettings.
    """

    drop_rates: Float[Tensor, "branches 1"]

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()
        if settings.backbone is not None:
            raise ValueError(
                f"encoder.backbone: {settings.backbone} is no vision transformer, which is asked for here. "
                "Set it to null."
            )
        self.settings = settings
        self.prefix = settings.prefix
        self.position_grid = settings.grid  # of the position table, even in a copy for images of another size
        width = self.width = settings.width
        self.patch_embed = make_tokenizer(settings)
        if settings.class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        if settings.registers:
            self.reg_token = nn.Parameter(torch.zeros(1, settings.registers, width))
        if settings.mask_token:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self._make_positions()
        self.dropout = nn.Dropout(settings.dropout)
        self.norm_pre = make_norm(settings, width) if settings.pre_norm else nn.Identity()
        rates = [settings.drop_path * i / max(settings.depth - 1, 1) for i in range(settings.depth)]
        rates[-1] = settings.drop_path  # even with a single block
        self.blocks = nn.ModuleList(Block(settings, rate) for rate in rates)
        self.register_buffer("drop_rates", torch.tensor(rates).repeat_interleave(2)[:, None], persistent=False)
        self.norm = make_norm(settings, width) if settings.final_norm else nn.Identity()
        self.attn_pool = AttentionPool(settings) if settings.pooling == "attention" else None
        self.fc_norm = make_norm(settings, width) if settings.fc_norm else nn.Identity()
        self.reset_parameters()

    # ---- images -> tokens ------------------------------------------------------------------------------------

    def forward(
        self,
        images: Float[Tensor, "b c h w"],
        visible: Int[Tensor, "b k"] | None = None,
        hidden: Bool[Tensor, "b n"] | None = None,
        path_noise: Float[Tensor, "branches b"] | None = None,
    ) -> Float[Tensor, "b t d"]:
        """Tokens after the final norm: prefix tokens, then patches row by row (or as `visible` lists them).

        Args:
            images: RGB, or settings.channels channels, normalized by settings.mean and std. The sides may be any
                multiples of the patch size; positions are interpolated.
            visible: patch indices from zero; only these patches are embedded and encoded (MAE).
            hidden: True where the mask token replaces a patch, before positions are added (DINOv2, SimMIM).
            path_noise: uniform random numbers for stochastic depth, two rows per block; drawn here if None.

        Raises:
            ValueError: a size that is no multiple of the patch size, a wrong number of channels, or `hidden` without a
                mask token.
        """
        tokens, layout = self.embed(images, visible, hidden)
        path_scale = self._path_scale(tokens, path_noise)
        for number in range(1, len(self.blocks) + 1):
            tokens = self._run_block(number, tokens, layout, path_scale)
        return self.norm(tokens)

    def init_kv_cache(self, batch: int) -> list[KVCache]:
        """Empty caches of keys and values for `decode`, one per block.

        Raises:
            ValueError: not a causal pixel encoder, so earlier tokens depend on later pixels.
        """
        settings = self.settings
        if not settings.causal or settings.tokens != "pixel":
            raise ValueError(
                "only a causal encoder of pixels can decode pixel by pixel "
                f"(here causal: {str(settings.causal).lower()}, tokens: {settings.tokens})."
            )
        length = settings.grid[0] * settings.grid[1]
        return [KVCache(batch, length, settings, self.pixel_tokens.embed.weight) for _ in self.blocks]

    def decode(self, indices: Int[Tensor, "b k"], kv_caches: list[KVCache]) -> Float[Tensor, "b t d"]:
        """Tokens after the final norm at the next positions, equal to those of `forward`.

        The input at position i is pixel i - 1. The first call also returns position 0, where the input is the start
        token, so it may have no pixels. The last pixel of an image is never an input.

        Args:
            indices: palette indices of the next k pixels.
            kv_caches: from `init_kv_cache`; the new positions are appended to them.

        Raises:
            ValueError: the caches are for another number of images, or there are more pixels than positions.
        """
        start = kv_caches[0].length
        tokens = self.pixel_tokens.embed(indices) if start else self.pixel_tokens.begin(indices)
        stop = start + tokens.shape[1]
        grid = self.settings.grid
        images, length = kv_caches[0].keys.shape[0], kv_caches[0].keys.shape[2]
        if len(tokens) != images or stop > length:
            raise ValueError(
                f"{len(tokens)} images and {stop} positions, but this cache is for {images} images of {length} "
                "pixels, the last of which is the input of no position."
            )
        _, rows = self.position_table(grid)
        if rows is not None:
            tokens = tokens + rows[start:stop]
        rotation = self._rotation(grid, None, tokens.device)
        if rotation is not None:
            rotation = rotation[0][:, :, start:stop], rotation[1][:, :, start:stop]
        layout, tokens = TokenLayout(grid, 0, None, rotation), self.norm_pre(tokens)
        for block, kv_cache in zip(self.blocks, kv_caches, strict=True):
            tokens = block(tokens, layout, kv_cache=kv_cache)
        return self.norm(tokens)

    def intermediates(
        self, images: Float[Tensor, "b c h w"], blocks: Collection[int], norm: bool = False, attention: bool = False
    ) -> Iterator[Intermediate]:
        """Yield the outputs of the given blocks in order of depth, each computed on demand.

        Args:
            images: as for `forward`.
            blocks: numbers of blocks, counted from 1; 0 stands for the input of the first block.
            norm: normalize tokens as this encoder's features are normalized (settings.feature_norm).
            attention: also compute the block's attention weights, which takes a slower path; the output is the same.

        Raises:
            ValueError: a block that does not exist, or the norm or attention of block 0.
        """
        first = 1 if norm or attention else 0
        wrong = sorted(block for block in blocks if not first <= block <= len(self.blocks))
        if wrong:
            raise ValueError(f"layers {wrong} do not exist: this encoder has blocks 1 to {len(self.blocks)}.")
        tokens, layout = self.embed(images)
        if 0 in blocks:
            yield Intermediate(0, tokens, layout)
        path_scale = self._path_scale(tokens)
        for number in range(1, max(blocks, default=0) + 1):
            weights = None
            if attention and number in blocks:
                block = self.block(number)
                weights = block.attn.weights(block.norm1(tokens), layout)
            tokens = self._run_block(number, tokens, layout, path_scale)
            if number in blocks:
                yield Intermediate(number, self._feature_norm(number)(tokens) if norm else tokens, layout, weights)

    def layers(self, images: Float[Tensor, "b c h w"], numbers: list[int]) -> list[Float[Tensor, "b t d"]]:
        """Outputs of the given blocks, counted from 1, without normalization; 0 is the input of the first block."""
        found = {block.number: block.tokens for block in self.intermediates(images, numbers)}
        return [found[number] for number in numbers]

    def features(
        self, images: Float[Tensor, "b c h w"], layer: int | None = None, pooling: str | None = None
    ) -> Float[Tensor, "b d"]:
        """One vector per image, by default from the layer and with the pooling of this encoder's settings."""
        layer = self.settings.probed_layer if layer is None else layer
        (block,) = self.intermediates(images, [layer], norm=True)
        return self.pool(block.tokens, pooling)

    def _feature_norm(self, number: int) -> nn.Module:
        """The norm that is applied to a block's output before it is probed."""
        is_next = self.settings.feature_norm == "next" and number < len(self.blocks)
        return self.block(number + 1).norm1 if is_next else self.norm

    def pool(self, tokens: Float[Tensor, "b t d"], pooling: str | None = None) -> Float[Tensor, "b d"]:
        """Pool tokens to one vector per image: mean, class token or attention pool; settings.pooling if None."""
        pooling = pooling or self.settings.pooling
        if pooling == "attention":
            if self.attn_pool is None:
                raise ValueError("pooling: attention, but this encoder has no attention pool. Use mean or class.")
            pooled = self.attn_pool(tokens)
        elif pooling == "class":
            if not self.settings.class_token:
                raise ValueError("pooling: class, but this encoder has no class token. Use mean or attention.")
            pooled = tokens[:, 0]
        elif pooling == "mean":
            pooled = tokens[:, self.prefix :].mean(1)  # over the patches, without class and register tokens
        else:
            raise ValueError(f"pooling: '{pooling}' is not one of class, mean, attention.")
        return self.fc_norm(pooled)

    def to_display(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """`to_display` with this encoder's settings."""
        return to_display(images, self.settings)

    def embed(
        self,
        images: Float[Tensor, "b c h w"],
        visible: Int[Tensor, "b k"] | None = None,
        hidden: Bool[Tensor, "b n"] | None = None,
    ) -> tuple[Float[Tensor, "b t d"], TokenLayout]:
        """The first block's input, and the positions of its tokens."""
        if images.shape[1] != self.settings.channels:
            raise ValueError(
                f"images have {images.shape[1]} channels, this encoder takes {self.settings.channels} "
                "(encoder.channels)."
            )
        grid = self.settings.grid_of(*images.shape[2:])
        if visible is not None and self.settings.causal:
            raise ValueError("visible: a causal encoder reads every patch in order. Pass no `visible`.")
        if hidden is not None and self.settings.causal and self.settings.tokens == "pixel":
            raise ValueError("hidden: a causal pixel sequence is shifted by one position. Set encoder.causal to false.")
        # under autocast, the residual stream keeps the images' precision with every kind of positions
        tokens = self.patch_embed(images, visible).to(images.dtype)  # b k d
        if hidden is not None:
            if not self.settings.mask_token:
                raise ValueError("hidden: this encoder has no mask token. Set encoder.mask_token to true.")
            is_hidden = gather_tokens(hidden[:, :, None], visible)  # b k 1
            tokens = torch.where(is_hidden, self.mask_token.to(tokens.dtype), tokens)
        row_prefix, row_patches = self.position_table(grid)
        if row_patches is not None:
            rows = row_patches[None].expand(tokens.shape[0], -1, -1) if visible is not None else row_patches[None]
            tokens = tokens + gather_tokens(rows, visible)
        prefix = self._prefix_tokens(row_prefix)
        if prefix is not None:
            tokens = torch.cat([prefix.expand(tokens.shape[0], -1, -1).to(tokens.dtype), tokens], 1)
        layout = TokenLayout(grid, self.prefix, visible, self._rotation(grid, visible, images.device))
        return self.norm_pre(self.dropout(tokens)), layout

    # ---- positions -------------------------------------------------------------------------------------------

    def _make_positions(self) -> None:
        settings = self.settings
        kind, grid, width = settings.pos_embed, settings.grid, settings.width
        rows = settings.position_rows
        if kind == "learned_1d":
            self.pos_embed = nn.Parameter(torch.zeros(1, rows + grid[0] * grid[1], width))
        elif kind == "learned_2d":
            self.pos_embed_prefix = nn.Parameter(torch.zeros(1, rows, width)) if rows else None
            self.pos_embed_row = nn.Parameter(torch.zeros(grid[0], 1, width))
            self.pos_embed_column = nn.Parameter(torch.zeros(1, grid[1], width))
        elif kind in ("sincos_1d", "sincos_2d"):
            table = sincos_2d(grid, width) if kind == "sincos_2d" else sincos_1d(grid[0] * grid[1], width)
            self.register_buffer("pos_embed", sincos_table(table, rows))

    def position_table(self, grid: tuple[int, int]) -> tuple[Tensor | None, Tensor | None]:
        """Position embeddings of the prefix tokens and of a grid of patches; None if there is no table."""
        settings = self.settings
        if settings.has_fixed_size and grid != self.position_grid:
            raise ValueError(
                f"a pixel sequence is tied to its size: this encoder takes {self.position_grid} pixels, not {grid}. "
                "Resize the images (encoder.image_size)."
            )
        if settings.pos_embed in ("none", *ROTARY, "relative_bias"):
            return None, None
        how = (self.position_grid, grid, settings.interpolate_antialias, settings.interpolate_offset)
        if settings.pos_embed == "learned_2d":
            prefix = None if self.pos_embed_prefix is None else self.pos_embed_prefix[0]
            return prefix, resample_table((self.pos_embed_row + self.pos_embed_column).flatten(0, 1), *how)
        return table_on_grid(self.pos_embed, settings.position_rows, *how)

    def _rotation(
        self, grid: tuple[int, int], visible: Tensor | None, device: torch.device
    ) -> tuple[Tensor, Tensor] | None:
        if self.settings.pos_embed not in ROTARY:
            return None

        def with_prefix(table: Tensor, still: float) -> Tensor:
            rows = table[None] if visible is None else gather_tokens(table[None].expand(len(visible), -1, -1), visible)
            prefix = rows.new_full((rows.shape[0], self.prefix, rows.shape[2]), still)  # prefix tokens are not rotated
            return torch.cat([prefix, rows], 1)[:, None]

        if self.settings.pos_embed == "rotary_2d":
            rows, columns = self.settings.rotary_grid or self.settings.grid
            sides = scaled_coordinates(grid, (rows, columns), device)
        else:
            sides = normalized_coordinates(grid, device)
        cos, sin = rotary_2d(sides, self.settings.head_width)
        return with_prefix(cos, 1.0), with_prefix(sin, 0.0)

    def _prefix_tokens(self, positions: Tensor | None) -> Tensor | None:
        tokens = [getattr(self, name) for name in ("cls_token", "reg_token") if hasattr(self, name)]
        if not tokens:
            return None
        prefix = torch.cat(tokens, 1)
        rows = self.settings.position_rows
        if positions is None or not rows:
            return prefix
        return torch.cat([prefix[:, :rows] + positions, prefix[:, rows:]], 1)

    @property
    def pixel_tokens(self) -> PixelTokens:
        """The tokenizer of a pixel encoder, which converts colors to palette indices and back."""
        assert isinstance(self.patch_embed, PixelTokens)
        return self.patch_embed

    # ---- blocks ----------------------------------------------------------------------------------------------

    def block(self, number: int) -> Block:
        """One block, counted from 1."""
        block = self.blocks[number - 1]
        assert isinstance(block, Block)
        return block

    def _path_scale(self, tokens: Tensor, path_noise: Tensor | None = None) -> Float[Tensor, "branches b"] | None:
        """Factors for each residual branch of each sample: 0 where its random number is below the drop rate.

        The numbers are drawn here unless they are given. None without stochastic depth.
        """
        if not (self.training and self.settings.drop_path):
            return None
        if path_noise is None:
            path_noise = torch.rand(2 * len(self.blocks), tokens.shape[0], device=tokens.device)
        return (path_noise >= self.drop_rates).to(tokens.dtype) / (1 - self.drop_rates)

    def _run_block(
        self, number: int, tokens: Float[Tensor, "b t d"], layout: TokenLayout, path_scale: Tensor | None
    ) -> Float[Tensor, "b t d"]:
        block = self.block(number)
        scale = path_scale[2 * number - 2 : 2 * number] if path_scale is not None and block.drop_rate else None
        return run_block(block, tokens, layout, scale, self.settings.activation_checkpointing)

    def reset_parameters(self) -> None:
        """Initialize weights by settings.init, biases of linear layers with zero, tokens and tables with std 0.02."""
        start: Callable[[Tensor], object] = nn.init.xavier_uniform_ if self.settings.init == "xavier" else _small_normal
        for module in self.modules():
            if isinstance(module, nn.Linear):
                start(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                _small_normal(module.weight)
        if self.settings.tokens == "pixel" and self.settings.color_init == "fourier":
            self.pixel_tokens.start_from_colors()
        projection = getattr(self.patch_embed, "proj", None)
        # 'normal' keeps torch's initialization of convolutions: a fixed std would be too small for small patches
        if isinstance(projection, nn.Conv2d) and self.settings.init != "normal":
            start(projection.weight.flatten(1))  # a linear layer stored as a convolution
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        tables = ("cls_token", "reg_token", "mask_token", "pos_embed", "pos_embed_prefix", "pos_embed_row",
                  "pos_embed_column", "patch_embed.start_token")  # fmt: skip
        for name, parameter in self.named_parameters():
            if name in tables:
                _small_normal(parameter)
        if self.settings.init == "scaled":
            self._start_scaled()

    def _start_scaled(self) -> None:
        """Initialize weights whose std is not 0.02 but depends on width and depth, as in iGPT's released code."""
        width, depth = self.settings.width, self.settings.depth
        for number in range(1, depth + 1):
            block = self.block(number)
            nn.init.normal_(block.attn.qkv.weight, std=width**-0.5)
            nn.init.normal_(block.attn.proj.weight, std=(width * depth) ** -0.5)
        table = getattr(self, "pos_embed", None)
        if isinstance(table, nn.Parameter):
            nn.init.normal_(table, std=0.01)


def _small_normal(weight: Tensor) -> None:
    nn.init.trunc_normal_(weight, std=0.02)


def to_display(images: Float[Tensor, "b c h w"], settings: EncoderSettings) -> Float[Tensor, "b c h w"]:
    """Normalized images as pixels from 0 to 1: the inverse of an encoder's normalization."""
    mean, std = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (settings.mean, settings.std))
    return (images * std + mean).clamp(0, 1)
