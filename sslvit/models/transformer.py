"""The transformer block, pre-norm (Dosovitskiy et al. 2021, section 3.1), and its parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sslvit.models.positions import RelativeBias, TokenLayout, rotate
from sslvit.models.tokens import gather_tokens
from sslvit.settings import EncoderSettings


class KVCache:
    """Cached keys and values of one block, so that decoding does not recompute them.

    Args:
        batch: number of sequences.
        length: number of positions of a complete sequence.
        settings: settings of the encoder.
        like: a tensor with the device and dtype of the cache.
    """

    def __init__(self, batch: int, length: int, settings: EncoderSettings, like: Tensor) -> None:
        shape = (batch, settings.heads, length, settings.head_width)
        self.keys, self.values = like.new_empty(shape), like.new_empty(shape)
        self.length = 0

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append the next positions, and return the keys and values of all positions so far, 'b heads t e'."""
        start, self.length = self.length, self.length + key.shape[2]
        self.keys[:, :, start : self.length] = key
        self.values[:, :, start : self.length] = value
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the approximation of GELU in iGPT's released model."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation elementwise."""
        return F.silu(1.702 * x) / 1.702  # silu has fused kernels for the forward and the backward pass


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU, "gelu_tanh": partial(nn.GELU, approximate="tanh"), "quick_gelu": QuickGELU, "swiglu": nn.SiLU,
}  # fmt: skip


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm, at least as precise as its input even where FSDP2 has gathered its weights in bf16."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize each token over its channels."""
        return F.layer_norm(x, self.normalized_shape, as_precise(self.weight, x), as_precise(self.bias, x), self.eps)


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm, with the same precision as `LayerNorm` above."""

    def forward(self, x: Tensor) -> Tensor:
        """Divide each token by its root mean square."""
        return F.rms_norm(x, self.normalized_shape, as_precise(self.weight, x), self.eps)


def as_precise(weight: Tensor, x: Tensor) -> Tensor:
    """Cast a weight to the precision of an input unless its own is higher."""
    return weight.to(torch.promote_types(weight.dtype, x.dtype))


def make_norm(settings: EncoderSettings, width: int) -> nn.Module:
    """Make a normalization layer of the encoder's kind over `width` channels."""
    if settings.norm == "rms":
        return RMSNorm(width, eps=settings.norm_eps)
    return LayerNorm(width, eps=settings.norm_eps)


# bf16 on a CPU: torch's fused kernel is slow in the backward pass and on short sequences. It does not support a learned
# bias, and torch's fallback is slower still. Milliseconds of forward and backward pass, written out (two products and a
# softmax) / fused, for 4 images and 8 heads of 32 channels on one core with AMX, torch 2.15 (with wider heads, and on
# cores without AMX, the crossover also lies between 480 and 780 tokens):
#   tokens             257        577         784          1024
#   no mask          8 / 17     52 / 68    122 / 71     208 / 107
#   causal          13 / 17     56 / 47    157 / 59     260 / 91
#   fixed bias      12 / 24     57 / 96    162 / 108    297 / 153
#   learned bias    14 / 30     64 / 200   185 / 414    339 / 662
# Without gradients, the fused kernel is as fast at 37 tokens and 1.4 to 8 times as fast from 200 tokens on.
FUSED_BF16_TOKENS = 640
# Bytes of attention weights that are computed at once, few enough for a core's cache. For 16 images, 16 heads of 32
# channels and 197 tokens, both passes take 41 ms image by image instead of 69 ms at once (2, 4, 8 MiB: 42, 43, 49 ms).
WEIGHTS_AT_ONCE = 2**21


def is_written_out(query: Float[Tensor, "b heads t e"], has_learned_bias: bool) -> bool:
    """Whether attention is faster as two products and a softmax than by torch's fused kernel."""
    if query.device.type != "cpu" or query.dtype != torch.bfloat16:
        return False
    return has_learned_bias or (query.requires_grad and query.shape[2] < FUSED_BF16_TOKENS)


class WrittenOutAttention(torch.autograd.Function):
    """Attention as two products and a softmax; the backward pass recomputes the attention weights.

    If they were stored, they would be the largest tensors of a step; those of a few images at a time fit in the cache.
    The gradient of the softmax is FlashAttention's (Dao et al. 2022, appendix B.2). `bias` must broadcast to
    '1 heads t t' and gets no gradient.
    """

    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        """Attention outputs 'b heads t e' for a query, key and value of that shape."""
        mixed = torch.empty_like(query)
        for query_chunk, key_chunk, value_chunk, mixed_chunk in in_chunks(query, key, value, mixed):
            mixed_chunk.copy_(WrittenOutAttention.mixed(query_chunk, key_chunk, value_chunk, bias, scale))
        context.save_for_backward(query, key, value, bias, mixed)
        context.scale = scale
        return mixed

    @staticmethod
    def backward(context: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """Gradients of query, key and value."""
        *saved, bias, mixed = context.saved_tensors
        gradients = [torch.empty_like(one) for one in saved]
        for query, key, value, mixed_chunk, grad_chunk, *chunks in in_chunks(*saved, mixed, grad, *gradients):
            found = WrittenOutAttention.gradients(query, key, value, mixed_chunk, grad_chunk, bias, context.scale)
            for chunk, one in zip(chunks, found, strict=True):
                chunk.copy_(one)
        of_query, of_key, of_value = gradients
        return of_query, of_key, of_value, None, None

    @staticmethod
    def mixed(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        """Outputs of one chunk."""
        return _weights(query * scale, key, bias) @ value

    @staticmethod
    def gradients(
        query: Tensor, key: Tensor, value: Tensor, mixed: Tensor, grad: Tensor, bias: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value of one chunk."""
        query = query * scale
        weights = _weights(query, key, bias)
        of_value = weights.mT @ grad
        of_scores = (grad @ value.mT).sub_((grad * mixed).sum(-1, keepdim=True)).mul_(weights)
        return (of_scores @ key).mul_(scale), of_scores.mT @ query, of_value


def in_chunks(query: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split tensors 'b heads t e' into chunks of as many images as WEIGHTS_AT_ONCE allows."""
    _, heads, length, _ = query.shape
    images = max(WEIGHTS_AT_ONCE // (heads * length**2 * query.element_size()), 1)
    for first in range(0, len(query), images):
        yield tuple(one[first : first + images] for one in (query, *others))


def _weights(query: Tensor, key: Tensor, bias: Tensor | None) -> Float[Tensor, "b heads t t"]:
    scores = query @ key.mT
    return (scores if bias is None else scores.add_(bias)).softmax(-1)


class KeyUnbiasedLinear(nn.Linear):
    """The map to queries, keys and values, with the bias of the keys treated as zero and without a gradient.

    A key bias that starts at zero, as in new and imported models, stays zero under weight decay and weight averaging.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Compute queries, keys and values."""
        width = self.out_features // 3
        bias = torch.cat([self.bias[:width], self.bias.new_zeros(width), self.bias[2 * width :]])
        return F.linear(x, self.weight, bias)


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017), configured by the encoder's settings.

    `causal`: a token attends only to itself and earlier tokens. `locality`: a token does not attend to itself, and
    each head learns its temperature (Lee et al. 2021, section 3.2). `written_out` computes attention where it is
    written out; a forecast puts a cheaper function of the same memory in its place.
    """

    written_out: Any = WrittenOutAttention

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()
        width = settings.width
        self.heads = settings.heads
        self.causal = settings.causal
        self.locality = settings.locality_self_attention
        linear = nn.Linear if settings.key_bias or not settings.bias else KeyUnbiasedLinear
        self.qkv = linear(width, 3 * width, bias=settings.bias)
        self.q_norm = make_norm(settings, settings.head_width) if settings.qk_norm else nn.Identity()
        self.k_norm = make_norm(settings, settings.head_width) if settings.qk_norm else nn.Identity()
        self.rel_pos = RelativeBias(settings.heads, settings.grid) if settings.pos_embed == "relative_bias" else None
        self.proj = nn.Linear(width, width, bias=settings.bias)
        scale = torch.full((settings.heads, 1, 1), settings.head_width**-0.5)
        if self.locality:
            self.scale = nn.Parameter(scale)
        else:
            self.register_buffer("scale", scale, persistent=False)

    def forward(
        self, tokens: Float[Tensor, "b t d"], layout: TokenLayout | None = None, kv_cache: KVCache | None = None
    ) -> Float[Tensor, "b t d"]:
        """With a `kv_cache`, tokens also attend to the cached positions and are appended to the cache."""
        query, key, value = self.heads_of(tokens, layout)
        if kv_cache is not None:
            key, value = kv_cache.append(key, value)
            is_first = kv_cache.length == query.shape[2] and self.rel_pos is None
            bias = None if is_first else self.bias_after(query, kv_cache.length, layout)
            mixed = F.scaled_dot_product_attention(query, key, value, bias, is_causal=is_first and self.causal)
        elif is_written_out(query, self.rel_pos is not None):
            if self.locality or self.rel_pos is not None or query.shape[2] <= 3 * query.shape[3]:
                mixed = self.scores(query, key, layout).softmax(-1).to(value.dtype) @ value
            else:  # the weights are larger than queries, keys and values together
                bias = self.score_bias(query, layout)
                mixed = self.written_out.apply(query, key, value, bias, query.shape[3] ** -0.5)
        elif self.locality or self.rel_pos is not None:
            bias = self.score_bias(query, layout)
            mixed = F.scaled_dot_product_attention(query * self.scale.to(query.dtype), key, value, bias, scale=1.0)
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.proj(rearrange(mixed, "b heads t e -> b t (heads e)"))

    def weights(self, tokens: Float[Tensor, "b t d"], layout: TokenLayout | None) -> Float[Tensor, "b heads t t"]:
        """Attention weights, computed without a fused kernel; row i holds those of query token i."""
        query, key, _ = self.heads_of(tokens, layout)
        return self.scores(query, key, layout).softmax(-1)

    def heads_of(self, tokens: Tensor, layout: TokenLayout | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each 'b heads t e'."""
        query, key, value = rearrange(
            self.qkv(tokens), "b t (three heads e) -> three b heads t e", three=3, heads=self.heads
        )
        query, key = self.q_norm(query), self.k_norm(key)
        if layout is not None and layout.rotation is not None:
            query, key = rotate(query, layout.rotation), rotate(key, layout.rotation)
        return query, key, value

    def scores(self, query: Tensor, key: Tensor, layout: TokenLayout | None) -> Float[Tensor, "b heads t t"]:
        """Scaled products of queries and keys, plus `score_bias`."""
        scores = (query * self.scale.to(query.dtype)) @ key.transpose(-2, -1)
        bias = self.score_bias(query, layout)
        return scores if bias is None else scores + bias

    def bias_after(self, query: Tensor, length: int, layout: TokenLayout | None) -> Tensor | None:
        """Rows of `score_bias` for the last positions of a sequence of the given length."""
        if query.shape[2] == 1 and self.rel_pos is None:
            return None  # the last position attends to all
        bias = self.score_bias(query.new_empty(1, 1, length, 0), layout)
        assert bias is not None  # only a causal encoder decodes
        return bias[..., length - query.shape[2] : length, :length]

    def score_bias(self, query: Tensor, layout: TokenLayout | None) -> Tensor | None:
        """The bias added before the softmax, broadcastable to 'b heads t t'; -inf where attention is forbidden."""
        bias = None
        length = query.shape[2]
        if self.rel_pos is not None:
            bias = self.rel_pos(layout)[..., :length, :length]
        if self.causal or self.locality:
            every = torch.ones(length, length, dtype=torch.bool, device=query.device)
            is_forbidden = every.triu(1) if self.causal else torch.zeros_like(every)
            if self.locality:
                is_forbidden = is_forbidden | torch.eye(length, dtype=torch.bool, device=query.device)
            mask_bias = torch.zeros(length, length, device=query.device).masked_fill(is_forbidden, float("-inf"))
            bias = mask_bias if bias is None else bias + mask_bias
        return None if bias is None else bias.to(query.dtype)


class Mlp(nn.Module):
    """Two linear layers with an activation in between. swiglu (Shazeer 2020): silu(first half) * second half.

    Dropout acts on the input of the second layer, as in Dosovitskiy et al.'s code, timm and torch; dropout of the
    output is part of the block.
    """

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()
        self.gated = settings.mlp == "swiglu"
        hidden = settings.mlp_width
        self.fc1 = nn.Linear(settings.width, 2 * hidden if self.gated else hidden, bias=settings.bias)
        self.act = ACTIVATIONS[settings.mlp]()
        self.dropout = nn.Dropout(settings.dropout)
        self.fc2 = nn.Linear(hidden, settings.width, bias=settings.bias)

    def forward(self, tokens: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """Apply the MLP to each token separately."""
        hidden = self.fc1(tokens)
        if self.gated:
            gate, hidden = hidden.chunk(2, dim=-1)
            hidden = self.act(gate) * hidden
        else:
            hidden = self.act(hidden)
        return self.fc2(self.dropout(hidden))


class LayerScale(nn.Module):
    """A learned scale per channel (Touvron et al. 2021, "Going deeper with Image Transformers")."""

    def __init__(self, width: int, value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), value))

    def forward(self, tokens: Tensor) -> Tensor:
        """The scaled tokens."""
        return tokens * self.gamma


class Block(nn.Module):
    """Attention and MLP, each with a norm in front and a residual connection.

    Args:
        settings: settings of the encoder.
        drop_rate: probability that a sample skips a branch (stochastic depth, Huang et al. 2016).
    """

    def __init__(self, settings: EncoderSettings, drop_rate: float = 0.0) -> None:
        super().__init__()
        width, scale = settings.width, settings.layer_scale
        self.norm1 = make_norm(settings, width)
        self.attn = Attention(settings)
        self.ls1 = nn.Identity() if scale is None else LayerScale(width, scale)
        self.norm2 = make_norm(settings, width)
        self.mlp = Mlp(settings)
        self.ls2 = nn.Identity() if scale is None else LayerScale(width, scale)
        self.dropout = nn.Dropout(settings.dropout)
        self.drop_rate = drop_rate

    def forward(
        self,
        tokens: Float[Tensor, "b t d"],
        layout: TokenLayout | None = None,
        path_scale: Float[Tensor, "2 b"] | None = None,
        kv_cache: KVCache | None = None,
        wanted: Int[Tensor, "b k"] | None = None,
    ) -> Float[Tensor, "b k d"]:
        """The block's output for all tokens, or only for the `wanted` ones.

        A sample skips a branch if its `path_scale` is zero.
        """
        attended = self.dropout(self.ls1(self.attn(self.norm1(tokens), layout, kv_cache)))
        tokens = gather_tokens(tokens + drop_path(attended, path_scale, 0), wanted)
        mixed = self.dropout(self.ls2(self.mlp(self.norm2(tokens))))
        return tokens + drop_path(mixed, path_scale, 1)


def drop_path(branch: Float[Tensor, "b t d"], path_scale: Float[Tensor, "2 b"] | None, which: int) -> Tensor:
    """Stochastic depth on one of a block's two branches: zero for samples that skip it, scaled up for the rest."""
    return branch if path_scale is None else branch * path_scale[which, :, None, None]


def run_block(
    block: Block,
    tokens: Float[Tensor, "b t d"],
    layout: TokenLayout | None = None,
    path_scale: Float[Tensor, "2 b"] | None = None,
    recompute: bool = False,
    wanted: Int[Tensor, "b k"] | None = None,
) -> Float[Tensor, "b k d"]:
    """A block's output.

    With `recompute` (encoder.activation_checkpointing), the backward pass recomputes the activations inside the block.
    """
    if recompute and block.training and torch.is_grad_enabled():
        return checkpoint(block, tokens, layout, path_scale, wanted=wanted, use_reentrant=False)
    return block(tokens, layout, path_scale, wanted=wanted)
