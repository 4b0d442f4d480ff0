"""Settings of an encoder: its architecture, and how input images are prepared.

The same settings are written beside the weights (``encoder.json``), so an encoder can be rebuilt, fed and probed
from its folder alone.
"""

from __future__ import annotations

import math
import re
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Annotated, Any, Literal, cast

from sslvit.files import brief
from sslvit.plugins import find_plugin
from sslvit.settings.choices import Also, check_bounds, checked, not_one_of
from sslvit.settings.palette import check_palette

TOKEN_KINDS = ("patch", "conv_stem", "mbconv", "hybrid", "shifted_patch", "pixel")
PositionKind = Literal[
    "none", "learned_1d", "learned_2d", "sincos_1d", "sincos_2d", "rotary_2d", "rotary_2d_normalized", "relative_bias"
]  # fmt: skip
ROTARY = ("rotary_2d", "rotary_2d_normalized")

UNSET = cast("list[float]", None)  # set by __post_init__
MAX_CHANNELS = 10_000  # checked before lists of that length are created
OWN = "own"  # a backbone given as a module from Python
BACKBONE_NAME = re.compile(r"(torchvision|timm):\w{1,100}")
# settings that apply to a backbone; all others describe the vision transformer
OF_A_BACKBONE = (
    "image_size", "channels", "mean", "std", "interpolation", "crop_mode", "crop_fraction", "backbone", "small_stem",
)  # fmt: skip
WITHOUT_TOKENS: dict[str, Any] = {"patch": 1, "class_token": False, "pooling": "mean"}


def crop_words(mode: str, fraction: float, size: list[int] | None = None) -> str:
    """Describe the part of an image that evaluation uses.

    Args:
        mode: center or squash, as in EncoderSettings.
        fraction: Fraction of the box's sides.
        size: Height and width that give the proportions of a centered box; None to leave them out of the text.
    """
    proportions = f" with the proportions of {size[0]} x {size[1]}" if size else ""
    box = "the whole image, squashed" if mode == "squash" else f"the largest centered box{proportions}"
    return box if fraction == 1 else f"the middle {100 * fraction:.4g} % (of each side) of {box}"


@dataclass
@checked("encoder.")
class EncoderSettings:
    """A vision transformer and its input."""

    image_size: Annotated[list[int], Also(int)] = field(default_factory=lambda: [224, 224])
    """Height and width of input images in pixels, which the position table is made for; one number for a square."""
    channels: int = 3
    """Number of input channels."""
    mean: Annotated[list[float], Also(type(None))] = field(default_factory=lambda: UNSET)
    """Mean of each channel, subtracted from pixels in [0, 1]; null for ImageNet's, or 0.5 for other than 3 channels."""
    std: Annotated[list[float], Also(type(None))] = field(default_factory=lambda: UNSET)
    """Standard deviation of each channel, by which pixels are divided after subtracting the mean; null for ImageNet's,
    or 0.25 for other than 3 channels.
    """
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """Interpolation used to resize input images."""
    crop_mode: Literal["center", "squash"] = "center"
    """Crop for evaluation and exports: center (the largest centered box with the proportions of image_size) or squash
    (the whole image, with its proportions changed).
    """
    crop_fraction: float = 1.0
    """Fraction of that box's sides to keep (224 of 256: 0.875)."""
    tokens: str = "patch"
    """Tokenizer: patch (one linear map per patch), conv_stem (3 x 3 convolutions of stride 2, then a 1 x 1; Xiao et al.
    2021), mbconv (the convolutional stages of CoAtNet; Dai et al. 2021), hybrid (the feature map of a ResNet;
    Dosovitskiy et al. 2021, section 3.1), shifted_patch (five shifted copies, Lee et al. 2021), pixel (palette indices,
    Chen et al. 2020), or that of a plugin, PACKAGE.MODULE:NAME.
    """
    patch: int = 16
    """Side of a patch in pixels; for conv_stem and mbconv 2, 4, 8 and so on; for hybrid 4, 8, 16 or 32; for pixel 1."""
    patch_bias: bool = True
    """Use a bias in the linear map of patch tokens (CLIP has none)."""
    hybrid_backbone: Literal["resnet18", "resnet34", "resnet50"] = "resnet50"
    """ResNet of torchvision that makes hybrid tokens, cut off where its stride is `patch`."""
    palette: str | list[list[float]] = "uniform"
    """Colors of pixel tokens: uniform (3 bits per channel: 512 colors or 8 grays), a list of colors in [-1, 1], or, in
    a recipe and on the command line, a palette file (`sslvit palette` makes one).
    """
    color_init: Literal["normal", "fourier"] = "normal"
    """Initialization of the color embeddings: normal (random numbers, as in iGPT) or fourier (random Fourier features
    of the colors, Rahimi and Recht 2007, so that similar colors start with similar embeddings).
    """
    width: int = 768
    """Embedding dimension."""
    depth: int = 12
    """Number of blocks."""
    heads: int = 12
    """Number of attention heads, which must divide the width."""
    mlp_ratio: float = 4.0
    """Ratio of the MLP's hidden width to the width; their product is rounded. With swiglu, the hidden width is 2/3 of
    that, rounded up to a multiple of 8 (DINOv2).
    """
    mlp: Literal["gelu", "gelu_tanh", "quick_gelu", "swiglu"] = "gelu"
    """Activation of the MLP; SigLIP uses gelu_tanh, iGPT and CLIP use quick_gelu."""
    norm: Literal["layer", "rms"] = "layer"
    """Normalization: layer (LayerNorm) or rms (RMSNorm: no mean, no bias)."""
    norm_eps: float = 1e-6
    """Epsilon that normalization adds to the variance."""
    bias: bool = True
    """Use biases in the linear layers of the blocks."""
    key_bias: bool = True
    """Use a bias for the keys of attention; false fixes only this bias at zero (BEiT, DINOv3)."""
    layer_scale: float | None = None
    """Initial value of LayerScale, a learned factor per channel on each residual branch; null for none."""
    qk_norm: bool = False
    """Normalize queries and keys per head."""
    locality_self_attention: bool = False
    """Use Locality Self-Attention (Lee et al. 2021): a token does not attend to itself, and the temperature is learned.
    Cannot be combined with causal.
    """
    causal: bool = False
    """Let each token attend only to itself and earlier tokens."""
    dropout: float = 0.0
    """Dropout rate on the tokens, after a block's attention, and after both layers of its MLP, as in the code of timm
    and DINO (attention weights are not dropped, unlike in torch). MAE and DINO use no dropout.
    """
    drop_path: float = 0.0
    """Stochastic depth rate of the last block; it rises linearly from zero at the first one (Huang et al. 2016). A
    single block has the full rate.
    """
    pos_embed: PositionKind = "learned_1d"
    """Position embedding. Coordinates of rotary_2d count the patches of image_size; those of rotary_2d_normalized go
    from -1 to 1 along each side of any image, with periods from 1 to 100, so no size needs interpolation (DINOv3).
    """
    rotary_grid: list[int] | None = None
    """Rows and columns of the grid of patches whose coordinates rotary_2d uses, and to which those of other grids are
    scaled; null for the grid of image_size. It is kept when the weights are fine-tuned at another size.
    """
    prefix_positions: Literal["none", "class", "all"] = "class"
    """Prefix tokens that have their own row in the position table."""
    interpolate_antialias: bool = True
    """Use antialiasing when a position table is interpolated to a smaller grid."""
    interpolate_offset: float = 0.0
    """Number added to the new grid's sides to compute a scale factor, as in DINO and DINOv2 (0.1); 0 interpolates to
    the size itself.
    """
    class_token: bool = True
    """Prepend a learned class token."""
    registers: int = 0
    """Number of register tokens (Darcet et al. 2024) after the class token."""
    mask_token: bool = False
    """Include a learned token for masked patches."""
    pre_norm: bool = False
    """Normalize the tokens before the first block, after adding positions (CLIP)."""
    final_norm: bool = True
    """Normalize after the last block."""
    pooling: Literal["class", "mean", "attention"] = "class"
    """Pooling to one vector per image: class (the class token), mean (over patches) or attention (a learned query).
    """
    pool_mlp: bool = False
    """Follow attention pooling with an MLP on a residual branch with pre-normalization: the MAP head of Zhai et al.
    2022, as in SigLIP.
    """
    fc_norm: bool = False
    """Normalize the pooled vector."""
    feature_layer: int | None = None
    """Number of the block whose output is the feature for probes; null for the last."""
    feature_norm: Literal["final", "next"] = "final"
    """Normalization of those features: final (the encoder's last norm) or next (the first norm of the following block,
    as in iGPT's probe).
    """
    init: Literal["normal", "xavier", "scaled"] = "normal"
    """Initialization of the linear layers: normal (truncated, std 0.02; the patch projection by torch's default for
    convolutions, uniform up to 1 / sqrt(inputs), with its bias: timm, DINO), xavier (uniform, also the projection: MAE)
    or scaled (as in iGPT's released code: queries, keys and values 1 / sqrt(width), the output projection 1 /
    sqrt(width x depth), the position table 0.01, all else 0.02). docs/mae.md measures the projection's initialization
    at small patches.
    """
    activation_checkpointing: bool = False
    """Recompute the blocks' activations (also those of MAE's decoder) in the backward pass instead of storing them."""
    backbone: str | None = None
    """Network instead of the vision transformer: torchvision:NAME or timm:NAME, such as torchvision:resnet18, or own (a
    module from Python). Only image_size to crop_fraction and small_stem then apply, and no other key of this section.
    """
    small_stem: bool = False
    """Replace a ResNet's 7 x 7 convolution of stride 2 by a 3 x 3 one of stride 1, and leave out its max pooling, for
    images of 32 or 64 pixels (SimCLR: Chen et al. 2020, appendix B.9, after He et al. 2016, section 4.2).
    """

    def __post_init__(self) -> None:
        if isinstance(self.image_size, int):
            self.image_size = [self.image_size, self.image_size]
        self.image_size = list(self.image_size)
        is_known = self.tokens in TOKEN_KINDS
        if not is_known and not (isinstance(self.tokens, str) and find_plugin("encoder.tokens", self.tokens)):
            raise ValueError(f"encoder.tokens: {not_one_of(self.tokens, TOKEN_KINDS)}")
        if self.channels > MAX_CHANNELS:
            raise ValueError(f"encoder.channels: {self.channels} is above {MAX_CHANNELS:,}.")
        if self.mean is None:
            self.mean = [0.485, 0.456, 0.406] if self.channels == 3 else [0.5] * self.channels
        if self.std is None:
            self.std = [0.229, 0.224, 0.225] if self.channels == 3 else [0.25] * self.channels
        if self.backbone is not None:
            self._forget_transformer()
        elif self.small_stem:
            raise ValueError("encoder.small_stem: is for a backbone (encoder.backbone). Set it to false.")
        self.check()
        if self.pos_embed != "rotary_2d":
            self.rotary_grid = None
        elif self.rotary_grid is None:
            self.rotary_grid = list(self.grid)

    @property
    def has_fixed_size(self) -> bool:
        """Whether the encoder only accepts one image size: a pixel sequence with non-rotary positions."""
        return self.tokens == "pixel" and self.pos_embed not in ROTARY

    def _forget_transformer(self) -> None:
        """Reset the settings of the vision transformer, which do not apply to a backbone, to fixed values."""
        name = self.backbone or ""
        if name != OWN and not BACKBONE_NAME.fullmatch(name):
            raise ValueError(
                f"encoder.backbone: {brief(name)} is not torchvision:NAME or timm:NAME, such as torchvision:resnet18 "
                "(weights are not named here: they are what a run starts from)."
            )
        for one in fields(self):
            if one.name not in OF_A_BACKBONE:
                setattr(self, one.name, WITHOUT_TOKENS.get(one.name, _default_of(one)))

    def check(self) -> None:
        """Raise ValueError for the first invalid combination, with the keys and the remedy."""
        sizes = ("channels", "patch", "width", "depth", "heads", "mlp_ratio", "norm_eps")
        check_bounds(self, "encoder.", "positive", *sizes)
        check_bounds(self, "encoder.", "in [0, 1)", "dropout", "drop_path")
        check_bounds(self, "encoder.", "in (0, 1]", "crop_fraction")
        check_bounds(self, "encoder.", "0 or more", "registers")
        if len(self.image_size) != 2:
            raise ValueError(f"encoder.image_size: {brief(self.image_size)} must be one side or [height, width].")
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
            if (found := len(getattr(self, key))) != self.channels:
                raise ValueError(f"encoder.{key}: {found} values for {self.channels} channels. Give one per channel.")
        if not all(std > 0 for std in self.std):
            raise ValueError(f"encoder.std: {brief(self.std)} must be positive.")
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
                "encoder.locality_self_attention: a causal first token could attend to nothing once it is "
                "masked itself. Set either causal or locality_self_attention to false."
            )
        if self.tokens in ("conv_stem", "mbconv") and (self.patch < 2 or self.patch & (self.patch - 1)):
            raise ValueError(
                f"encoder.patch: a convolutional stem halves the image step by step, so {self.patch} "
                "must be a power of two from 2 on."
            )
        if not self.patch_bias and self.tokens != "patch":
            raise ValueError(f"encoder.patch_bias: false is for tokens: patch, not {self.tokens}. Set it to true.")
        if self.tokens == "hybrid" and self.patch not in (4, 8, 16, 32):
            raise ValueError(f"encoder.patch: a ResNet's strides are 4, 8, 16 and 32, not {self.patch}.")
        if self.pos_embed == "sincos_2d" and self.width % 4:
            raise ValueError(f"encoder.width: sincos_2d positions need a multiple of 4, not {self.width}.")
        if self.pos_embed == "sincos_1d" and self.width % 2:
            raise ValueError(f"encoder.width: sincos_1d positions need an even width, not {self.width}.")
        if self.pos_embed in ROTARY and self.head_width % 4:
            raise ValueError(
                f"encoder.heads: {self.pos_embed} positions need width / heads in multiples of 4, "
                f"not {self.width} / {self.heads} = {self.head_width}."
            )
        if self.rotary_grid is not None and not (len(self.rotary_grid) == 2 and min(self.rotary_grid) > 0):
            raise ValueError(f"encoder.rotary_grid: {brief(self.rotary_grid)} must be [rows, columns] of patches.")
        if self.feature_layer is not None and not 1 <= self.feature_layer <= self.depth:
            raise ValueError(f"encoder.feature_layer: {self.feature_layer} is outside 1..{self.depth} (encoder.depth).")

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches in an image; raises ValueError if the patch does not divide its sides."""
        if height % self.patch or width % self.patch or not height or not width:
            raise ValueError(
                f"An image of {height} x {width} pixels cannot be cut into patches of {self.patch} (encoder.patch). "
                f"Resize it (encoder.image_size) to {self._nearest(height, width)}, or choose another patch."
            )
        return height // self.patch, width // self.patch

    def _nearest(self, height: int, width: int) -> str:
        """The nearest sides that are multiples of the patch."""
        near = [max(1, round(side / self.patch)) * self.patch for side in (height, width)]
        return str(near[0]) if near[0] == near[1] else str(near)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of image_size."""
        height, width = self.image_size
        return height, width

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches at image_size."""
        return self.grid_of(*self.image_size)

    @property
    def crop_in_words(self) -> str:
        """Description of the crop for evaluation and exports."""
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
    def probed_layer(self) -> int:
        """Number of the block, from 1, whose output is the feature by default."""
        return self.feature_layer or self.depth

    @property
    def head_width(self) -> int:
        """Dimension of an attention head."""
        return self.width // self.heads

    @property
    def mlp_width(self) -> int:
        """Hidden width of the MLP."""
        hidden = round(self.width * self.mlp_ratio)
        if self.mlp == "swiglu":
            hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        return hidden

    def largest_activation(self, height: int, width: int) -> int:
        """How many numbers the largest activation of an image has: that of the hidden layer of a block's MLP."""
        return math.prod(self.grid_of(height, width)) * self.mlp_width


def _default_of(one: Field[Any]) -> Any:
    return one.default if one.default_factory is MISSING else one.default_factory()
