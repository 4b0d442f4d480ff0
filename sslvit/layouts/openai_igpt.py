"""iGPT's released weights under the names of transformers' ImageGPT.

Linear weights are stored (in, out) there; the start token is the last row of the token table; the output matrix
is untied and becomes the extra `head.weight`.
"""

from __future__ import annotations

import math

from torch import Tensor

from sslvit.layouts.vit import Converted, count_blocks, infer_heads
from sslvit.settings import preset

BLOCK = {
    "ln_1.": "norm1.", "ln_2.": "norm2.", "attn.c_attn.": "attn.qkv.", "attn.c_proj.": "attn.proj.",
    "mlp.c_fc.": "mlp.fc1.", "mlp.c_proj.": "mlp.fc2.",
}  # fmt: skip


def recognise(keys: set[str]) -> bool:
    return any(key.removeprefix("transformer.") == "wte.weight" for key in keys)


def to_sslvit(state: dict[str, Tensor], heads: int | None = None, **changes) -> Converted:
    """transformers' ImageGPT -> ours. The palette is not in the file: pass palette=, or the uniform one is set."""
    notes: list[str] = []
    state = {key.removeprefix("transformer."): value for key, value in state.items()}
    table = state["wte.weight"]
    width = table.shape[1]
    encoder = {
        "patch_embed.embed.weight": table[:-1],
        "patch_embed.start_token": table[None, -1:],
        "pos_embed": state["wpe.weight"][None],
        "norm.weight": state["ln_f.weight"],
    }
    for key, value in state.items():
        if key.startswith("h.") and not key.endswith((".attn.bias", ".attn.masked_bias")):
            number, part = key.removeprefix("h.").split(".", 1)
            for theirs, ours in BLOCK.items():
                if part.startswith(theirs):
                    part = ours + part.removeprefix(theirs)
                    break
            encoder[f"blocks.{number}.{part}"] = value.T if value.ndim == 2 else value
    for number in range(count_blocks(state, "h.")):  # biases of only some linear layers: the others are zero
        if f"blocks.{number}.attn.proj.bias" in encoder:
            encoder.setdefault(f"blocks.{number}.attn.qkv.bias", table.new_zeros(3 * width))
    extras = {"head.weight": state["lm_head.weight"]} if "lm_head.weight" in state else {}
    if "palette" not in changes:
        notes.append("palette: not in the file; set to uniform. Give palette= if the model was trained on clusters.")
    found = {
        "image_size": math.isqrt(state["wpe.weight"].shape[0]),
        "width": width,
        "depth": count_blocks(state, "h."),
        "heads": infer_heads(width, heads, notes),
        "mlp_ratio": encoder["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "bias": "blocks.0.attn.proj.bias" in encoder,
    }
    return Converted(preset("igpt_small", **{**found, **changes}), encoder, extras, notes)
