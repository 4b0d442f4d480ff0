"""The one encoder that every task trains, every probe scores and every export ships.

    images -> tokens -> positions -> prefix tokens -> blocks -> norm

What differs between tasks comes in as an argument (which patches are visible, which are hidden) or as a saved
property (causal, the tokenizer), so there is no branch on the task.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sslvit.models.pooling import AttentionPool, pool_class, pool_mean
from sslvit.models.positions import Places, is_same, resample_table, rotary_2d, sincos_1d, sincos_2d
from sslvit.models.tokens import TOKENIZERS, take
from sslvit.models.transformer import Block, Memory, make_norm, run_block
from sslvit.settings import EncoderSettings


class ViTEncoder(nn.Module):
    """A vision transformer. Parameter names follow timm's where timm has the part.

    Args:
        settings: what it is; see EncoderSettings.
    """

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()
        self.settings = settings
        self.prefix = settings.prefix
        width = settings.width
        self.patch_embed = TOKENIZERS[settings.tokens](settings)
        if settings.class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        if settings.registers:
            self.reg_token = nn.Parameter(torch.zeros(1, settings.registers, width))
        if settings.mask_token:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self._make_positions()
        self.dropout = nn.Dropout(settings.dropout)
        rates = [settings.drop_path * i / max(settings.depth - 1, 1) for i in range(settings.depth)]
        rates[-1] = settings.drop_path  # also where the first block is the last
        self.blocks = nn.ModuleList(Block(settings, rate) for rate in rates)
        self.norm = make_norm(settings, width) if settings.final_norm else nn.Identity()
        self.attn_pool = AttentionPool(width, settings.heads) if settings.pooling == "attention" else None
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
            images: RGB (or as many channels as settings.channels), normalized by settings.mean and std. Any size
                that the patch divides; positions are stretched to it.
            visible: patch indices from zero; only these patches are embedded and encoded (MAE).
            hidden: True where a patch is replaced by the mask token, before positions (DINOv2, SimMIM).
            path_noise: uniform numbers for stochastic depth, two rows per block; drawn here when None.

        Raises:
            ValueError: a size that the patch does not divide, other channels, or `hidden` without a mask token.
        """
        tokens, places = self.embed(images, visible, hidden)
        tokens, _ = self._run_blocks(tokens, places, path_noise=path_noise)
        return self.norm(tokens)

    def init_kv_cache(self, batch: int) -> list[Memory]:
        """Empty memories for `decode`, one per block.

        Raises:
            ValueError: the encoder is no causal pixel encoder, so later pixels change what earlier ones mean.
        """
        settings = self.settings
        if not settings.causal or settings.tokens != "pixel":
            raise ValueError(
                "only a causal encoder of pixels can be read on pixel by pixel "
                f"(here causal: {str(settings.causal).lower()}, tokens: {settings.tokens})."
            )
        length = settings.grid[0] * settings.grid[1]
        return [Memory(batch, length, settings, self.patch_embed.embed.weight) for _ in self.blocks]

    def decode(self, indices: Int[Tensor, "b k"], memories: list[Memory]) -> Float[Tensor, "b t d"]:
        """Tokens after the final norm at the places that the next k pixels open: what `forward` gives there.

        The first call also opens place 0, with the start token, so it may have no pixels. The last pixel of an image
        opens no place.

        Args:
            indices: palette indices of the pixels that follow those read so far.
            memories: from `init_kv_cache`; these pixels are added to them.

        Raises:
            ValueError: another number of images than the memories are for, or more pixels than open places.
        """
        start = memories[0].length
        tokens = self.patch_embed.embed(indices) if start else self.patch_embed.begin(indices)
        stop = start + tokens.shape[1]
        grid = self.settings.grid
        images, length = memories[0].keys.shape[0], memories[0].keys.shape[2]
        if len(tokens) != images or stop > length:
            raise ValueError(
                f"{len(tokens)} images and {stop} places, but these memories are for {images} images of {length} "
                "pixels, the last of which opens no place."
            )
        _, rows = self.position_table(grid)
        if rows is not None:
            tokens = tokens + rows[start:stop]
        rotation = self._rotation(grid, None, tokens.device)
        if rotation is not None:
            rotation = tuple(turn[:, :, start:stop] for turn in rotation)
        places = Places(grid, 0, None, rotation)
        for block, memory in zip(self.blocks, memories, strict=True):
            tokens = block(tokens, places, memory=memory)
        return self.norm(tokens)

    def layers(self, images: Float[Tensor, "b c h w"], numbers: list[int]) -> list[Float[Tensor, "b t d"]]:
        """Outputs of the given blocks, counted from 1, not normalized; 0 is the input of the first block."""
        self._check_layers(numbers, first=0)
        tokens, places = self.embed(images)
        _, outputs = self._run_blocks(tokens, places, upto=max(numbers, default=0), kept=set(numbers))
        return [outputs[number] for number in numbers]

    def features(
        self, images: Float[Tensor, "b c h w"], layer: int | None = None, pooling: str | None = None
    ) -> Float[Tensor, "b d"]:
        """One vector per image, at the layer and pooling that this encoder is probed with unless others are given."""
        if layer is None:
            layer = self.settings.feature_layer or len(self.blocks)
        return self.features_at(images, [(layer, pooling or self.settings.pooling)])[0]

    def features_at(
        self, images: Float[Tensor, "b c h w"], places: Sequence[tuple[int, str]]
    ) -> list[Float[Tensor, "b d"]]:
        """`features` at several places (a block, counted from 1, and a pooling), in one pass."""
        numbers = {number for number, _ in places}
        self._check_layers(sorted(numbers), first=1)

        def feature(number: int, tokens: Tensor) -> dict[str, Tensor]:
            tokens = self.feature_norm_of(number)(tokens)
            return {pooling: self.pool(tokens, pooling) for at, pooling in places if at == number}

        tokens, where = self.embed(images)
        _, found = self._run_blocks(tokens, where, upto=max(numbers), kept=numbers, as_what=feature)
        return [found[number][pooling] for number, pooling in places]

    def patch_features(
        self, images: Float[Tensor, "b c h w"], layer: int | None = None
    ) -> Float[Tensor, "b d rows columns"]:
        """The patches' tokens at the layer that this encoder is probed with unless another is given, as a map."""
        number = layer or self.settings.feature_layer or len(self.blocks)
        self._check_layers([number], first=1)
        tokens, where = self.embed(images)
        tokens, _ = self._run_blocks(tokens, where, upto=number)
        rows, columns = where.grid
        patches = self.feature_norm_of(number)(tokens)[:, self.prefix :]
        return rearrange(patches, "b (rows columns) d -> b d rows columns", rows=rows, columns=columns)

    def feature_norm_of(self, number: int) -> nn.Module:
        """What normalizes a block's output before it is probed."""
        is_next = self.settings.feature_norm == "next" and number < len(self.blocks)
        return self.blocks[number].norm1 if is_next else self.norm

    def pool(self, tokens: Float[Tensor, "b t d"], pooling: str | None = None) -> Float[Tensor, "b d"]:
        pooling = pooling or self.settings.pooling
        if pooling == "attention":
            if self.attn_pool is None:
                raise ValueError("pooling: attention, but this encoder has no attention pool. Use mean or class.")
            pooled = self.attn_pool(tokens)
        elif pooling == "class":
            pooled = pool_class(tokens, int(self.settings.class_token))
        elif pooling == "mean":
            pooled = pool_mean(tokens, self.prefix)
        else:
            raise ValueError(f"pooling: '{pooling}' is not one of class, mean, attention.")
        return self.fc_norm(pooled)

    def attention(self, images: Float[Tensor, "b c h w"], layer: int) -> Float[Tensor, "b heads t t"]:
        """Attention weights of one block, counted from 1, by the slow path that gives the same output."""
        self._check_layers([layer], first=1)
        tokens, places = self.embed(images)
        tokens, _ = self._run_blocks(tokens, places, upto=layer - 1)
        block = self.blocks[layer - 1]
        return block.attn.weights(block.norm1(tokens), places)

    def _check_layers(self, numbers: list[int], first: int) -> None:
        wrong = [number for number in numbers if not first <= number <= len(self.blocks)]
        if wrong:
            raise ValueError(f"layers {wrong} do not exist: this encoder has blocks 1 to {len(self.blocks)}.")

    def embed(
        self,
        images: Float[Tensor, "b c h w"],
        visible: Int[Tensor, "b k"] | None = None,
        hidden: Bool[Tensor, "b n"] | None = None,
    ) -> tuple[Float[Tensor, "b t d"], Places]:
        """The first block's input, and where its tokens lie."""
        if images.shape[1] != self.settings.channels:
            raise ValueError(
                f"images have {images.shape[1]} channels, this encoder takes {self.settings.channels} "
                "(encoder.channels)."
            )
        grid = self.settings.grid_of(*images.shape[2:])
        if visible is not None and self.settings.causal:
            raise ValueError("visible: a causal encoder reads every place in order. Pass no `visible`.")
        if hidden is not None and self.settings.causal and self.settings.tokens == "pixel":
            raise ValueError("hidden: a causal pixel sequence is shifted by one place. Set encoder.causal to false.")
        # under autocast the residual stream keeps the images' precision, whatever the positions
        tokens = self.patch_embed(images, visible).to(images.dtype)  # b k d
        if hidden is not None:
            tokens = self._hide(tokens, take(hidden[:, :, None], visible)[:, :, 0])
        row_prefix, row_patches = self.position_table(grid)
        if row_patches is not None:
            rows = row_patches[None].expand(tokens.shape[0], -1, -1) if visible is not None else row_patches[None]
            tokens = tokens + take(rows, visible)
        prefix = self._prefix_tokens(row_prefix)
        if prefix is not None:
            tokens = torch.cat([prefix.expand(tokens.shape[0], -1, -1).to(tokens.dtype), tokens], 1)
        places = Places(grid, self.prefix, visible, self._rotation(grid, visible, images.device))
        return self.dropout(tokens), places

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
            table = torch.cat([torch.zeros(rows, width), table.float()])
            self.register_buffer("pos_embed", table[None])

    def position_table(self, grid: tuple[int, int]) -> tuple[Tensor | None, Tensor | None]:
        """Rows for the prefix tokens and for the patches of a grid; None where positions are not a table."""
        settings = self.settings
        if settings.tokens == "pixel" and grid != settings.grid:
            raise ValueError(
                f"a pixel sequence is tied to its size: this encoder takes {settings.grid} pixels, not {grid}. "
                "Resize the images (encoder.image_size)."
            )
        if settings.pos_embed in ("none", "rotary_2d", "relative_bias"):
            return None, None
        rows = settings.position_rows
        if settings.pos_embed == "learned_2d":
            prefix = None if self.pos_embed_prefix is None else self.pos_embed_prefix[0]
            patches = (self.pos_embed_row + self.pos_embed_column).flatten(0, 1)
        else:
            prefix, patches = self.pos_embed[0, :rows], self.pos_embed[0, rows:]
        if is_same(grid, settings.grid):
            return prefix, patches
        return prefix, resample_table(
            patches, settings.grid, grid, settings.interpolate_antialias, settings.interpolate_offset
        )

    def _rotation(self, grid: tuple[int, int], visible: Tensor | None, device: torch.device):
        if self.settings.pos_embed != "rotary_2d":
            return None
        turns = []
        for table, still in zip(
            rotary_2d(grid, self.settings.grid, self.settings.head_width, device), (1.0, 0.0), strict=True
        ):
            rows = table[None] if visible is None else take(table[None].expand(len(visible), -1, -1), visible)
            prefix = rows.new_full((rows.shape[0], self.prefix, rows.shape[2]), still)  # prefix tokens do not turn
            turns.append(torch.cat([prefix, rows], 1)[:, None])
        return tuple(turns)

    def _prefix_tokens(self, positions: Tensor | None) -> Tensor | None:
        tokens = [getattr(self, name) for name in ("cls_token", "reg_token") if hasattr(self, name)]
        if not tokens:
            return None
        prefix = torch.cat(tokens, 1)
        rows = self.settings.position_rows
        if positions is None or not rows:
            return prefix
        return torch.cat([prefix[:, :rows] + positions, prefix[:, rows:]], 1)

    def _hide(self, tokens: Tensor, is_hidden: Tensor) -> Tensor:
        if not self.settings.mask_token:
            raise ValueError("hidden: this encoder has no mask token. Set encoder.mask_token to true.")
        return torch.where(is_hidden[:, :, None], self.mask_token.to(tokens.dtype), tokens)

    # ---- blocks ----------------------------------------------------------------------------------------------

    def _run_blocks(
        self,
        tokens: Float[Tensor, "b t d"],
        places: Places,
        upto: int | None = None,
        kept: Collection[int] = (),
        path_noise: Tensor | None = None,
        as_what: Callable[[int, Tensor], Any] = lambda number, tokens: tokens,
    ) -> tuple[Float[Tensor, "b t d"], dict[int, Any]]:
        """Through the first `upto` blocks; also the outputs of the blocks to be kept (0: the input of the first).

        as_what(number, output) is what is kept, so that features need not wait as tokens.
        """
        if not self.training:
            path_noise = None
        elif path_noise is None and self.settings.drop_path:
            path_noise = torch.rand(2 * len(self.blocks), tokens.shape[0], device=tokens.device)
        outputs = {0: as_what(0, tokens)} if 0 in kept else {}
        for number, block in enumerate(self.blocks[:upto], start=1):
            noise = None if path_noise is None else path_noise[2 * number - 2 : 2 * number]
            tokens = run_block(block, tokens, places, noise, self.settings.activation_checkpointing)
            if number in kept:
                outputs[number] = as_what(number, tokens)
        return tokens, outputs

    def reset_parameters(self) -> None:
        """Maps by settings.init, zero biases in linear ones, and tokens and tables of std 0.02."""
        start = nn.init.xavier_uniform_ if self.settings.init == "xavier" else _small_normal
        for module in self.modules():
            if isinstance(module, nn.Linear):
                start(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                _small_normal(module.weight)
        if self.settings.tokens == "pixel" and self.settings.color_init == "fourier":
            self.patch_embed.start_from_colors()
        projection = getattr(self.patch_embed, "proj", None)
        # 'normal' leaves it as torch makes a convolution: a fixed deviation would be too small for small patches
        if projection is not None and self.settings.init != "normal":
            start(projection.weight.flatten(1))  # a linear map in a convolution's shape
            nn.init.zeros_(projection.bias)
        tables = ("cls_token", "reg_token", "mask_token", "pos_embed", "pos_embed_prefix", "pos_embed_row",
                  "pos_embed_column", "patch_embed.start_token")  # fmt: skip
        for name, parameter in self.named_parameters():
            if name in tables:
                _small_normal(parameter)
        if self.settings.init == "scaled":
            self._start_scaled()

    def _start_scaled(self) -> None:
        """What does not start with a deviation of 0.02 but by width and depth, as in iGPT's released code."""
        width, depth = self.settings.width, self.settings.depth
        for block in self.blocks:
            nn.init.normal_(block.attn.qkv.weight, std=width**-0.5)
            nn.init.normal_(block.attn.proj.weight, std=(width * depth) ** -0.5)
        if isinstance(getattr(self, "pos_embed", None), nn.Parameter):
            nn.init.normal_(self.pos_embed, std=0.01)


def _small_normal(weight: Tensor) -> None:
    nn.init.trunc_normal_(weight, std=0.02)
