"""Parameter groups: weight decay and learning rate of each parameter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from sslvit.optim.muon import block_matrices

# attention's temperature (LSA) would drift toward uniform attention; bias tables are exempt as in Swin's code
NEVER_DECAY = ("attn.scale", "rel_pos.table")
TOKENS = ("cls_token", "reg_token", "mask_token", "start_token", "query", "pos_embed", "pos_embed_prefix",
          "pos_embed_row", "pos_embed_column")  # fmt: skip


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: not to biases, norms, scales, learned temperatures and bias tables."""
    return parameter.ndim > 1 and not name.endswith(NEVER_DECAY)


def layer_of(name: str, depth: int) -> int:
    """Layer of a parameter for layer-wise learning rates: 0 for embeddings, i + 1 for block i, depth + 1 for the rest.

    MAE fine-tuning (He et al. 2022, appendix A.1), after BEiT.
    """
    if name.startswith(("cls_token", "reg_token", "mask_token", "pos_embed", "patch_embed", "norm_pre")):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth + 1


def layer_decay_groups(
    named: Iterable[tuple[str, nn.Parameter]],
    depth: int,
    weight_decay: float,
    layer_decay: float = 1.0,
    spared: Sequence[str] = TOKENS,
    muon: bool = False,
) -> list[dict]:
    """One group per learning rate and weight decay, each with `lr_scale` = layer_decay ** (depth + 1 - layer).

    Weight decay applies to matrices, not to vectors and other exempt parameters (`decays`). Frozen parameters are left
    out.

    Args:
        named: parameters under the encoder's names; all others count as following the encoder.
        depth: Number of the encoder's blocks.
        weight_decay: Weight decay of matrices.
        layer_decay: ratio of a layer's learning rate to that of the next layer.
        spared: tokens and position tables without weight decay. MAE's and DINO's released pretraining code exempts
            only biases and one-dimensional parameters, so none; MAE's fine-tuning exempts all that the encoder has.
        muon: Whether the matrices of blocks are for Muon, in groups of their own.
    """
    groups: dict[tuple[float, bool, int], dict] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        does_decay = decays(name, parameter) and name.split(".")[-1] not in spared
        scale = layer_decay ** (depth + 1 - layer_of(name, depth))
        matrices = block_matrices(name, parameter) if muon else 0
        group = groups.setdefault((scale, does_decay, matrices), {
            "params": [], "weight_decay": weight_decay if does_decay else 0.0, "decays": does_decay, "lr_scale": scale,
            "matrices": matrices,
        })  # fmt: skip
        group["params"].append(parameter)
    return sorted(groups.values(), key=lambda group: group["decays"])
