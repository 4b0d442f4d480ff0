"""What an encoder is: every choice that its weights depend on, and how images reach it.

The same record is written beside the weights (``encoder.json``), so an encoder can be rebuilt, fed and probed
from its folder alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sslvit.files import brief
from sslvit.settings.choices import checked
from sslvit.settings.palette import check_palette

TokenKind = Literal["patch", "conv_stem", "hybrid", "shifted_patch", "pixel"]
PositionKind = Literal["none", "learned_1d", "learned_2d", "sincos_1d", "sincos_2d", "rotary_2d", "relative_bias"]

MAX_CHANNELS = 10_000  # before lists of that length are made


def crop_words(mode: str, fraction: float, size: list[int] | None = None) -> str:
    """The part of an image that is seen, for a reader.

    Args:
        mode: center or squash, as in EncoderSettings.
        fraction: of the box's sides.
        size: height and width whose proportions a centered box has, where they are to be said.
    """
    proportions = f" with the proportions of {size[0]} x {size[1]}" if size else ""
    box = "the whole image, squashed" if mode == "squash" else f"the largest centered box{proportions}"
    return box if fraction == 1 else f"the middle {100 * fraction:.4g} % (of each side) of {box}"


@dataclass
@checked("encoder.")
class EncoderSettings:
    """A vision transformer and its input.

    Args:
        image_size: height and width in pixels that the position table is made for (one number: a square).
        channels: input channels.
        mean: per channel, subtracted from pixels in [0, 1].
        std: per channel, divides after the mean is subtracted.
        interpolation: how images are resized on their way in.
        crop_mode: what evaluation and exports see of an image: center (the largest centered box with the proportions of
            image_size) or squash (the whole image, its proportions changed).
        crop_fraction: share of that box's sides that is kept (224 of 256: 0.875).
        tokens: patch (one linear map per patch), conv_stem (3 x 3 convolutions of stride 2, then a 1 x 1;
            Xiao et al. 2021), hybrid (the feature map of a ResNet; Dosovitskiy et al. 2021, section 3.1),
            shifted_patch (five shifted copies, Lee et al. 2021), pixel (palette indices, Chen et al. 2020).
        patch: side of a patch in pixels; for conv_stem a power of two; for hybrid 4, 8, 16 or 32; for pixel 1.
        hybrid_backbone: for hybrid tokens: which of torchvision's ResNets, cut where its stride is `patch`.
        palette: for pixel tokens: uniform (3 bits a channel: 512 colors or 8 grays), a list of colors in [-1, 1], or,
            in a recipe and on the command line, a file of them (`sslvit palette` makes one).
        color_init: what the vectors of a palette's colors start as: normal (random numbers: iGPT) or fourier
            (random Fourier features of the colors, Rahimi and Recht 2007: near colors start alike).
        width: channels of a token.
        depth: number of blocks.
        heads: attention heads; they divide the width.
        mlp_ratio: hidden width of the MLP over the width; their product is rounded. With swiglu the hidden width is 2/3
            of that, rounded up to a multiple of 8 (DINOv2).
        mlp: activation of the MLP.
        norm: layer (LayerNorm) or rms (RMSNorm: no mean, no bias).
        norm_eps: added to the variance.
        bias: biases in the linear layers of the blocks.
        layer_scale: initial value of a learned scale per channel on each residual branch; null for none.
        qk_norm: normalize queries and keys per head.
        locality_self_attention: Locality Self-Attention (Lee et al. 2021): a token does not attend to itself, and the
            temperature is learned. Not together with causal.
        causal: a token attends to itself and earlier ones only.
        dropout: on the tokens, after a block's attention, and behind both maps of its MLP, as timm's and DINO's code do
            (torch also drops attention weights; these do not). MAE and DINO train without.
        drop_path: stochastic depth of the last block; rises linearly from zero at the first one (Huang et al. 2016). A
            single block has all of it.
        pos_embed: see sslvit/models/positions.py.
        prefix_positions: which prefix tokens have a row of their own in the position table.
        interpolate_antialias: smooth when a position table shrinks to a smaller grid.
        interpolate_offset: added to the new grid's sides to form a scale factor, as DINO and DINOv2 did (0.1);
            0 asks for the size itself.
        class_token: put a learned token in front.
        registers: number of register tokens (Darcet et al. 2024) after the class token.
        mask_token: own a learned token for `hidden` patches.
        final_norm: normalize after the last block.
        pooling: what one vector per image is: class, mean (over patches) or attention (a learned query).
        fc_norm: normalize the pooled vector.
        feature_layer: blocks that an image passes before it is probed; null for all.
        feature_norm: what normalizes those tokens: final (the encoder's last norm) or next (the first norm of
            the following block, as iGPT's probe does).
        init: of the linear maps: normal (truncated, std 0.02; the projection of patches as torch starts a
            convolution, uniform up to 1 / sqrt(inputs) with its bias: timm, DINO), xavier (uniform, the projection too:
            MAE) or scaled (as in iGPT's released code: queries, keys and values 1 / sqrt(width), the map behind them
            1 / sqrt(width x depth), the position table 0.01, all else 0.02). docs/mae.md has what the projection's
            start is worth at small patches.
        activation_checkpointing: recompute blocks (MAE's decoder's too) in the backward pass instead of storing their
            activations.
    """

    image_size: int | list[int] = 224
    channels: int = 3
    mean: list[float] | None = None
    std: list[float] | None = None
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    crop_mode: Literal["center", "squash"] = "center"
    crop_fraction: float = 1.0
    tokens: TokenKind = "patch"
    patch: int = 16
    hybrid_backbone: Literal["resnet18", "resnet34", "resnet50"] = "resnet50"
    palette: str | list[list[float]] = "uniform"
    color_init: Literal["normal", "fourier"] = "normal"
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    mlp: Literal["gelu", "quick_gelu", "swiglu"] = "gelu"
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-6
    bias: bool = True
    layer_scale: float | None = None
    qk_norm: bool = False
    locality_self_attention: bool = False
    causal: bool = False
    dropout: float = 0.0
    drop_path: float = 0.0
    pos_embed: PositionKind = "learned_1d"
    prefix_positions: Literal["none", "class", "all"] = "class"
    interpolate_antialias: bool = True
    interpolate_offset: float = 0.0
    class_token: bool = True
    registers: int = 0
    mask_token: bool = False
    final_norm: bool = True
    pooling: Literal["class", "mean", "attention"] = "class"
    fc_norm: bool = False
    feature_layer: int | None = None
    feature_norm: Literal["final", "next"] = "final"
    init: Literal["normal", "xavier", "scaled"] = "normal"
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.image_size, int):
            self.image_size = [self.image_size, self.image_size]
        self.image_size = list(self.image_size)
        if self.channels > MAX_CHANNELS:
            raise ValueError(f"encoder.channels: {self.channels} is above {MAX_CHANNELS:,}.")
        if self.mean is None:
            self.mean = [0.485, 0.456, 0.406] if self.channels == 3 else [0.5] * self.channels
        if self.std is None:
            self.std = [0.229, 0.224, 0.225] if self.channels == 3 else [0.25] * self.channels
        self.check()

    def check(self) -> None:
        """Raise ValueError on the first combination that cannot work, naming the keys and the remedy."""
        for key in ("channels", "patch", "width", "depth", "heads", "mlp_ratio", "norm_eps"):
            if not getattr(self, key) > 0:
                raise ValueError(f"encoder.{key}: {getattr(self, key)} is not above zero.")
        for key in ("dropout", "drop_path"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"encoder.{key}: {getattr(self, key)} is not a share from 0 up to, not including, 1.")
        if not 0 < self.crop_fraction <= 1:
            raise ValueError(f"encoder.crop_fraction: {self.crop_fraction} is not above 0 and at most 1 (everything).")
        if self.registers < 0:
            raise ValueError(f"encoder.registers: {self.registers} is negative. Use 0 for none.")
        if len(self.image_size) != 2:
            raise ValueError(f"encoder.image_size: {brief(self.image_size)} is not one side or [height, width].")
        if not all(side > 0 and side % self.patch == 0 for side in self.image_size):
            raise ValueError(
                f"encoder.image_size: {' x '.join(map(str, self.image_size))} pixels cannot be cut into patches of "
                f"{self.patch} (encoder.patch). Set encoder.image_size to {self._nearest(*self.image_size)}, or "
                "encoder.patch to another side."
            )
        if self.width % self.heads:
            raise ValueError(
                f"encoder.heads: {self.heads} heads do not divide width {self.width}. "
                f"Use one of {[h for h in range(1, 33) if self.width % h == 0]}."
            )
        for key in ("mean", "std"):
            values = getattr(self, key)
            if len(values) != self.channels:
                raise ValueError(
                    f"encoder.{key}: {len(values)} values for {self.channels} channels. Give one per channel."
                )
        if not all(std > 0 for std in self.std):
            raise ValueError(f"encoder.std: {brief(self.std)} must be above zero.")
        if self.pooling == "class" and not self.class_token:
            raise ValueError(
                "encoder.pooling: class, but encoder.class_token is false. Set pooling to mean or attention."
            )
        if self.tokens == "pixel" and (self.class_token or self.registers):
            raise ValueError(
                "encoder.tokens: pixel sequences have no prefix tokens. "
                "Set class_token to false, registers to 0 and pooling to mean."
            )
        if self.tokens == "pixel" and self.patch != 1:
            raise ValueError(f"encoder.patch: a pixel token is 1 pixel wide, not {self.patch}. Set patch to 1.")
        if self.tokens == "pixel":
            check_palette(self.palette, self.channels)
        if self.causal and self.locality_self_attention:
            raise ValueError(
                "encoder.locality_self_attention: a causal first token could attend to nothing once its own place "
                "is masked. Set either causal or locality_self_attention to false."
            )
        if self.tokens == "conv_stem" and (self.patch < 2 or self.patch & (self.patch - 1)):
            raise ValueError(
                f"encoder.patch: a convolutional stem halves the image step by step, so {self.patch} "
                "must be a power of two from 2 on."
            )
        if self.tokens == "hybrid" and self.patch not in (4, 8, 16, 32):
            raise ValueError(f"encoder.patch: a ResNet's strides are 4, 8, 16 and 32, not {self.patch}.")
        if self.pos_embed == "sincos_2d" and self.width % 4:
            raise ValueError(f"encoder.width: sincos_2d positions need a multiple of 4, not {self.width}.")
        if self.pos_embed == "sincos_1d" and self.width % 2:
            raise ValueError(f"encoder.width: sincos_1d positions need an even width, not {self.width}.")
        if self.pos_embed == "rotary_2d" and self.head_width % 4:
            raise ValueError(
                f"encoder.heads: rotary_2d positions need width / heads in multiples of 4, "
                f"not {self.width} / {self.heads} = {self.head_width}."
            )
        if self.feature_layer is not None and not 1 <= self.feature_layer <= self.depth:
            raise ValueError(f"encoder.feature_layer: {self.feature_layer} is outside 1..{self.depth} (encoder.depth).")

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image; ValueError where the patch does not divide it."""
        if height % self.patch or width % self.patch or not height or not width:
            raise ValueError(
                f"An image of {height} x {width} pixels cannot be cut into patches of {self.patch} (encoder.patch). "
                f"Resize it (encoder.image_size) to {self._nearest(height, width)}, or choose another patch."
            )
        return height // self.patch, width // self.patch

    def _nearest(self, height: int, width: int) -> str:
        """Sides that the patch divides, near to these."""
        near = [max(1, round(side / self.patch)) * self.patch for side in (height, width)]
        return str(near[0]) if near[0] == near[1] else str(near)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of image_size, which is a list once it is checked."""
        assert isinstance(self.image_size, list)
        height, width = self.image_size
        return height, width

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches at image_size."""
        return self.grid_of(*self.image_size)

    @property
    def crop_in_words(self) -> str:
        """What evaluation and exports see of an image."""
        seen = crop_words(self.crop_mode, self.crop_fraction, self.image_size)
        return f"{seen}, resized to {' x '.join(map(str, self.image_size))} ({self.interpolation})"

    @property
    def prefix(self) -> int:
        """Number of tokens in front of the patches."""
        return int(self.class_token) + self.registers

    @property
    def position_rows(self) -> int:
        """Rows of the position table in front of the patches' rows."""
        return {"none": 0, "class": int(self.class_token), "all": self.prefix}[self.prefix_positions]

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def mlp_width(self) -> int:
        hidden = round(self.width * self.mlp_ratio)
        if self.mlp == "swiglu":
            hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        return hidden
