"""iGPT's released weights: the TensorFlow variables as arrays, and transformers' ImageGPT.

In transformers' layout, linear weights are stored as (in, out), the start token is the last row of the token table, and
the output matrix is untied; it is returned as the extra `head.weight`. TensorFlow's variables are first converted to
that layout.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor

from sslvit.layouts.preprocessing import PREPROCESSING, describe_preprocessing
from sslvit.layouts.vit import Converted, infer_heads, inverted, rename_prefix
from sslvit.settings import PRESETS, preset
from sslvit.settings.palette import UNIFORM, read_palette
from sslvit.weight_files import count_blocks

BLOCK = {
    "ln_1.": "norm1.", "ln_2.": "norm2.", "attn.c_attn.": "attn.qkv.", "attn.c_proj.": "attn.proj.",
    "mlp.c_fc.": "mlp.fc1.", "mlp.c_proj.": "mlp.fc2.",
}  # fmt: skip
NOT_WEIGHTS = ("adam", "global_step", "_step", "beta1_power", "beta2_power", "clf")  # in TensorFlow's names


def recognize(keys: set[str]) -> bool:
    """Whether the weights include iGPT's token table, under either library's name."""
    names = {key.removeprefix("transformer.") for key in keys}
    return "wte.weight" in names or is_tensorflow(keys)


def is_tensorflow(keys: set[str]) -> bool:
    """Whether the names are TensorFlow's."""
    return {"wte", "sos", "wpe"} <= {plain_name(key) for key in keys}


def plain_name(key: str) -> str:
    """A TensorFlow variable's name without scope and output: model/h0/attn/q_proj:0 -> h0/attn/q_proj."""
    return key.removeprefix("model/").removesuffix(":0")


def released_heads(width: int, depth: int) -> int | None:
    """The number of heads of the released model of this size; None if there is none."""
    shapes = {(values["width"], values["depth"]): values for name, values in PRESETS.items() if name.startswith("igpt")}
    return shapes[width, depth]["heads"] if (width, depth) in shapes else None


def from_tensorflow(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], int, list[str]]:
    """TensorFlow's variables -> transformers' state dict, the number of heads (from their shapes), and ignored names.

    The weights of queries, keys and values and the output projection are stored as (heads, channels of a head, width).
    """
    state = {plain_name(key): value for key, value in state.items()}
    ignored = [key for key in state if any(word in key.lower() for word in NOT_WEIGHTS)]
    state = {key: value for key, value in state.items() if key not in ignored}
    width = state["wte"].shape[1]
    found = {
        "wte.weight": torch.cat([state.pop("wte"), state.pop("sos").reshape(1, width)]),
        "wpe.weight": state.pop("wpe").reshape(-1, width),
    }
    if "wtet" in state:
        found["lm_head.weight"] = state.pop("wtet").reshape(-1, width)
    heads = state["h0/attn/q_proj"].shape[0]
    for key, value in state.items():
        if match := re.fullmatch(r"h(\d+)/attn/q_proj", key):
            parts = [state[f"h{match[1]}/attn/{word}_proj"].reshape(width, width) for word in "qkv"]
            found[f"h.{match[1]}.attn.c_attn.weight"] = torch.cat(parts).T
        elif match := re.fullmatch(r"h(\d+)/attn/c_proj", key):
            found[f"h.{match[1]}.attn.c_proj.weight"] = value.reshape(width, width)
        elif not key.endswith(("/k_proj", "/v_proj")):
            name = re.sub(r"^h(\d+)/", r"h.\1.", key).replace("/", ".")
            name = re.sub(r"\.[gw]$", ".weight", name)  # a norm's gain, a linear map
            found[re.sub(r"\.b$", ".bias", name)] = value.squeeze()
    return found, heads, ignored


def to_sslvit(state: dict[str, Tensor], heads: int | None = None, **changes: Any) -> Converted:
    """Convert either layout.

    If `heads` is None, it is that of the released model of this size, or one head per 64 channels. The palette is
    one of the `changes`: a file of colors, a list of colors, or uniform, which is the default and leaves a note.
    """
    notes: list[str] = []
    ignored: list[str] = []
    try:
        if is_tensorflow(set(state)):
            state, known_heads, ignored = from_tensorflow(state)
            heads = heads or known_heads
        state = {key.removeprefix("transformer."): value for key, value in state.items()}
        return _convert(state, heads, notes, ignored, changes)
    except KeyError as error:
        raise ValueError(f"layout openai_igpt: {error} is missing. Is the file complete, and iGPT's?") from error


def from_sslvit(encoder: dict[str, Tensor], extras: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names -> those of transformers' ImageGPT; biases that our encoder lacks are set to zero."""
    found = {
        "wte.weight": torch.cat([encoder["patch_embed.embed.weight"], encoder["patch_embed.start_token"][0]]),
        "wpe.weight": encoder["pos_embed"][0],
        "ln_f.weight": encoder["norm.weight"],
    }
    for key, value in encoder.items():
        if not key.startswith("blocks."):
            continue
        _, number, name = key.split(".", 2)
        key = f"h.{number}.{rename_prefix(name, inverted(BLOCK))}"
        found[key] = value.T.contiguous() if value.ndim == 2 else value
        if value.ndim == 2:
            found.setdefault(key.replace("weight", "bias"), value.new_zeros(len(value)))
    if "head.weight" in extras:
        found = {f"transformer.{key}": value for key, value in found.items()} | {
            "lm_head.weight": extras["head.weight"]
        }
    return found


def _convert(
    state: dict[str, Tensor], heads: int | None, notes: list[str], ignored: list[str], changes: dict[str, Any]
) -> Converted:
    """Convert from the names of transformers."""
    table = state["wte.weight"]
    width = table.shape[1]
    encoder = {
        "patch_embed.embed.weight": table[:-1],
        "patch_embed.start_token": table[None, -1:],
        "pos_embed": state["wpe.weight"][None],
        "norm.weight": state["ln_f.weight"],
    }
    extras = {"head.weight": state["lm_head.weight"]} if "lm_head.weight" in state else {}
    tables = {"wte.weight", "wpe.weight", "ln_f.weight", "lm_head.weight"}
    for key, value in state.items():
        if not key.startswith("h.") and key not in tables:
            extras[key] = value
        elif key.endswith((".attn.bias", ".attn.masked_bias")):  # the causal mask
            ignored.append(key)
        elif key.startswith("h."):
            _, number, name = key.split(".", 2)
            encoder[f"blocks.{number}.{rename_prefix(name, BLOCK)}"] = value.T if value.ndim == 2 else value
    depth = count_blocks(state, "h.")
    have_biases = [f"blocks.{number}.attn.qkv.bias" in encoder for number in range(depth)]
    if "bias" not in changes and "blocks.0.attn.proj.bias" in encoder and not any(have_biases):
        notes.append("biases: the file has none of queries, keys and values; they are zero.")
        for block in range(depth):
            encoder[f"blocks.{block}.attn.qkv.bias"] = table.new_zeros(3 * width)
    palette = changes.get("palette", UNIFORM)
    if not isinstance(palette, list) and palette != UNIFORM:
        changes["palette"] = palette = read_palette(palette)
    colors = 512 if palette == UNIFORM else len(palette)
    if colors != len(table) - 1:
        raise ValueError(f"palette: {colors} colors for a model of {len(table) - 1}. Give the one it was trained on.")
    if "palette" not in changes:
        notes.append("palette: not in the file; set to uniform. Give the released clusters: --palette FILE.")
    positions = state["wpe.weight"].shape[0]
    if math.isqrt(positions) ** 2 != positions and "image_size" not in changes:
        raise ValueError(f"{positions} positions are no square. Give --image-size HEIGHT WIDTH.")
    found = {
        "image_size": math.isqrt(positions),
        "width": width,
        "depth": depth,
        "heads": infer_heads(width, heads or released_heads(width, depth), notes),
        "mlp_ratio": encoder["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "bias": "blocks.0.attn.proj.bias" in encoder,
    }
    settings = preset("igpt_small", **{**found, **changes})
    if assumed := {key: getattr(settings, key) for key in PREPROCESSING if key not in changes}:
        notes.append(f"preprocessing: not in the file; assumed: {describe_preprocessing(assumed)}.")
    return Converted(settings, encoder, extras, notes, ignored)
