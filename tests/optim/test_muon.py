"""Muon: nearly orthogonal updates of blocks' matrices, AdamW for the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from run_fixtures import run
from shard_fixtures import labeled_shards
from torch import nn

import sslvit
from sslvit.models import ViTEncoder
from sslvit.optim import Muon, check_matrices, layer_decay_groups
from sslvit.optim.muon import block_matrices, orthogonalize
from sslvit.settings import EncoderSettings
from sslvit.sharded_checkpoint import read_checkpoint

LR, DECAY, BETAS = 1e-2, 0.05, (0.9, 0.95)


class Network(nn.Module):
    """A block with a square, a wide, a tall and a stacked matrix, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        block = {
            "proj": nn.Linear(16, 16),
            "fc1": nn.Linear(16, 64),
            "fc2": nn.Linear(64, 16),
            "qkv": nn.Linear(16, 48),
        }
        self.blocks = nn.ModuleList([nn.ModuleDict(block)])
        self.head = nn.Linear(16, 4)


def muon_of(network: nn.Module, **options) -> Muon:
    return Muon(layer_decay_groups(network.named_parameters(), 1, DECAY, muon=True, **options), LR, BETAS)


def give_gradients(*networks: nn.Module, seed: int = 1) -> None:
    for network in networks:
        source = torch.Generator().manual_seed(seed)
        for parameter in network.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=source)


@pytest.mark.parametrize("shape", [(32, 32), (32, 128), (1, 7)])
def test_singular_values_come_close_to_one_and_directions_stay(shape: tuple[int, int]) -> None:
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)) * 1e-4
    u, values, v = torch.linalg.svd(matrices, full_matrices=False)
    kept = values > 0.02 * values[:, :1]  # the smallest ones need more iterations
    aligned = torch.diagonal(u.mT @ orthogonalize(matrices) @ v.mT, dim1=1, dim2=2)
    assert aligned[kept].min() > 0.6
    assert aligned.max() < 1.3


def test_whole_matrices_move_as_those_of_torchs_muon() -> None:
    """Without stacked matrices, it is torch's implementation for blocks and torch's AdamW for all else."""
    network, other = Network(), Network()
    del network.blocks[0]["qkv"], other.blocks[0]["qkv"]
    matrices = [p for name, p in other.named_parameters() if "blocks" in name and p.ndim == 2]
    biases = [p for name, p in other.named_parameters() if p.ndim == 1]
    optimizers = [
        muon_of(network),
        torch.optim.Muon(matrices, lr=LR, weight_decay=DECAY, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(biases, lr=LR, weight_decay=0, betas=BETAS),
        torch.optim.AdamW([other.head.weight], lr=LR, weight_decay=DECAY, betas=BETAS),
    ]
    start = {name: p.detach().clone() for name, p in network.named_parameters()}
    for seed in range(3):
        give_gradients(network, other, seed=seed)
        for optimizer in optimizers:
            optimizer.step()
    for name, expected in other.named_parameters():
        moved, ours = expected - start[name], network.get_parameter(name) - start[name]
        assert (moved - ours).norm() < (0.02 if "blocks" in name and moved.ndim == 2 else 1e-5) * moved.norm(), name


def test_queries_keys_and_values_are_three_matrices() -> None:
    network, parts = Network(), [Network() for _ in range(3)]
    before = network.blocks[0]["qkv"].weight.detach().clone()
    give_gradients(network)
    gradient = network.blocks[0]["qkv"].weight.grad.clone()
    muon_of(network).step()
    for number, part in enumerate(parts):
        weight = part.blocks[0]["proj"].weight
        rows = slice(16 * number, 16 * (number + 1))
        with torch.no_grad():
            weight.copy_(before[rows])
        weight.grad = gradient[rows].clone()
        muon_of(part).step()
        torch.testing.assert_close(network.blocks[0]["qkv"].weight[rows], weight, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["proj", "fc1", "fc2", "qkv"])
def test_an_update_has_the_size_of_adamws(kind: str) -> None:
    """Root mean square of 0.2 times the learning rate (Liu et al. 2025), whatever the gradient's scale."""
    network = Network()
    weight = network.blocks[0][kind].weight
    before = weight.detach().clone()
    give_gradients(network)
    weight.grad *= 1e3
    muon_of(network).step()
    change = weight - before * (1 - LR * DECAY)
    assert 0.6 * 0.2 * LR < change.square().mean().sqrt() < 1.3 * 0.2 * LR


def test_each_layer_has_its_own_rate() -> None:
    network = Network()
    before = network.blocks[0]["proj"].weight.detach().clone()
    give_gradients(network)
    optimizer = muon_of(network, layer_decay=0.5)
    for group in optimizer.param_groups:
        group["lr"] = 0.0 if group["lr_scale"] == 0.5 else LR
    optimizer.step()
    assert torch.equal(network.blocks[0]["proj"].weight, before)
    assert optimizer.state[network.blocks[0]["proj"].weight]["momentum"].abs().sum() > 0


def test_matrices_of_blocks_are_muons_and_nothing_else() -> None:
    encoder = ViTEncoder(
        EncoderSettings(image_size=[8, 8], channels=1, patch=4, width=16, depth=1, heads=2, registers=1)
    )
    chosen = {name: block_matrices(name, p) for name, p in encoder.named_parameters() if block_matrices(name, p)}
    assert chosen == {"blocks.0.attn.qkv.weight": 3, "blocks.0.attn.proj.weight": 1, "blocks.0.mlp.fc1.weight": 1,
                      "blocks.0.mlp.fc2.weight": 1}  # fmt: skip


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_skipped_step_changes_neither_weights_nor_momenta(value: float) -> None:
    network = Network()
    optimizer = muon_of(network)
    give_gradients(network)
    optimizer.found_inf, optimizer.grad_scale = torch.zeros(()), None
    optimizer.step()
    weights, state = [p.detach().clone() for p in network.parameters()], str(optimizer.state_dict())
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, value)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(torch.equal(now, old) for now, old in zip(network.parameters(), weights, strict=True))
    assert str(optimizer.state_dict()) == state


def test_frozen_parameters_and_missing_gradients_are_left_alone() -> None:
    network = Network()
    network.blocks[0]["fc1"].requires_grad_(False)
    optimizer = muon_of(network)
    give_gradients(network)
    network.blocks[0]["proj"].weight.grad = None
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    gradients = {name: p.grad for name, p in network.named_parameters()}
    optimizer.step()
    same = {name for name, p in network.named_parameters() if torch.equal(p, before[name])}
    assert same == {"blocks.0.fc1.weight", "blocks.0.fc1.bias", "blocks.0.proj.weight"}
    assert all(p.grad is gradients[name] for name, p in network.named_parameters())


@pytest.mark.parametrize(("recipe", "matrices"), [("mae/digits", 8), ("dino/digits", 4), ("igpt/digits", 4)])
def test_each_task_trains_its_blocks_with_it(tmp_path: Path, recipe: str, matrices: int) -> None:
    """Those of the encoder, and in MAE's case of the decoder."""
    shards = labeled_shards(tmp_path / "shards") / "train"
    done = run(shards, tmp_path / "run", recipe=recipe, **{"optim.name": "muon", "train.steps": 4})
    state = read_checkpoint(done.checkpoint)["optimizer_states"][0]["state"].values()
    momenta = [values["momentum"] for values in state if "momentum" in values]
    assert len(momenta) == matrices
    assert all(momentum.abs().sum() > 0 for momentum in momenta)
    assert all(set(values) == {"step", "exp_avg", "exp_avg_sq"} for values in state if "momentum" not in values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.strategy": "fsdp", "train.devices": 2}, "optim.name: muon needs whole matrices, .*Use ddp, or adamw"),
        ({"encoder.backbone": "torchvision:resnet18"}, "optim.name: muon is for .*blocks, .*has none. Use adamw"),
    ],
)
def test_what_it_cannot_train_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    shards = labeled_shards(tmp_path / "shards") / "train"
    with pytest.raises(ValueError, match=message):
        sslvit.pretrain("dino/digits", data=str(shards), out=str(tmp_path / "run"), **{"optim.name": "muon", **changes})
    assert not (tmp_path / "run").exists()


def test_sharded_matrices_are_refused_in_a_trainer_of_your_own() -> None:
    network = Network()
    check_matrices(network)
    network.blocks[0]["proj"].weight.to_local = lambda: None  # as FSDP2's parameters have it
    with pytest.raises(ValueError, match="these weights are sharded. Use ddp, or adamw"):
        check_matrices(network)
