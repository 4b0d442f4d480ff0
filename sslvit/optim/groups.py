"""Which weights decay."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Two parameter groups: matrices (and tokens) decay; biases, norms and other vectors do not.

    MAE's pretraining groups: a parameter is spared if it has one dimension or is a bias; class and mask tokens
    have three dimensions and decay. Parameters without gradient are left out.
    """
    decayed, spared = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            is_vector = parameter.ndim <= 1 or name.endswith(".bias")
            (spared if is_vector else decayed).append(parameter)
    return [
        {"params": spared, "weight_decay": 0.0, "decays": False},
        {"params": decayed, "weight_decay": weight_decay, "decays": True},
    ]


def layer_of(name: str, depth: int) -> int:
    """Depth of a parameter for layer-wise rates: embeddings 0, block i i + 1, everything behind depth + 1.

    MAE fine-tuning (He et al. 2022, appendix A.1), after BEiT.
    """
    if name.startswith(("cls_token", "reg_token", "mask_token", "pos_embed", "patch_embed")):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth + 1


def layer_decay_groups(
    named: Iterable[tuple[str, nn.Parameter]], depth: int, weight_decay: float, layer_decay: float
) -> list[dict]:
    """One group per layer and decay, each with `rate_scale` = layer_decay ** (depth + 1 - layer).

    Vectors, the class token and the position table do not decay.

    Args:
        named: parameters under the encoder's names; all others count as behind it.
        depth: of the encoder.
        weight_decay: of matrices.
        layer_decay: rate of a layer over that of the one behind it.
    """
    groups: dict[tuple[int, float], dict] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        is_spared = parameter.ndim == 1 or name in ("cls_token", "pos_embed")
        key = (layer_of(name, depth), 0.0 if is_spared else weight_decay)
        scale = layer_decay ** (depth + 1 - key[0])
        group = groups.setdefault(
            key, {"params": [], "weight_decay": key[1], "decays": not is_spared, "rate_scale": scale}
        )
        group["params"].append(parameter)
    return list(groups.values())
