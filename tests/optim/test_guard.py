"""A step that is not finite is skipped by any optimizer, and what became of each step is told once."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from sslvit.optim import StepGuard
from sslvit.optim.guard import HostCopy
from sslvit.optim.lars import LARS
from sslvit.settings import OptimSettings


def linear() -> tuple[torch.nn.Linear, StepGuard]:
    torch.manual_seed(0)
    network = torch.nn.Linear(2, 3)
    return network, StepGuard(network, OptimSettings())


def take(
    guard: StepGuard, optimizer: torch.optim.Optimizer, step: int, bias: float = 1.0, forward: Callable = lambda: None
) -> None:
    """A step whose weights have the gradient 1, and whose biases another."""
    network = guard.network
    guard.begin_step()
    forward()
    network.weight.grad, network.bias.grad = torch.ones(3, 2), torch.full((3,), bias)
    guard.check_gradients(optimizer, step)
    optimizer.step()
    guard.end_step()


@pytest.mark.parametrize("kind", ["adamw", "lars", "sgd"])
def test_any_optimizer_passes_a_step_by_that_is_not_finite(kind: str) -> None:
    """Fused AdamW is told on the device, others find no gradients."""
    network, guard = linear()
    optimizer = {
        "adamw": lambda: torch.optim.AdamW(network.parameters(), lr=0.1, weight_decay=0.5, fused=True),
        "lars": lambda: LARS(list(network.parameters()), lr=0.1, weight_decay=0.5, momentum=0.9),
        "sgd": lambda: torch.optim.SGD(network.parameters(), lr=0.1, weight_decay=0.5, momentum=0.9),
    }[kind]()
    take(guard, optimizer, 1)
    before, moments = [p.detach().clone() for p in network.parameters()], str(optimizer.state_dict()["state"])
    take(guard, optimizer, 2, bias=math.inf)
    assert guard.skipped
    assert all(torch.equal(now, old) for now, old in zip(network.parameters(), before, strict=True))
    assert str(optimizer.state_dict()["state"]) == moments
    take(guard, optimizer, 3)
    assert not guard.skipped
    assert all((now != old).any() for now, old in zip(network.parameters(), before, strict=True))


def test_what_became_of_steps_is_told_once_in_their_order_and_not_before_the_device_knows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network, guard = linear()
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    for step, bias in ((1, 1.0), (2, math.nan), (3, 1.0), (4, math.inf)):
        take(guard, optimizer, step, bias)
    with monkeypatch.context() as patch:
        patch.setattr(HostCopy, "is_here", False)
        assert list(guard.outcomes(wait=False)) == []
        assert guard.pending == 4
    told = [(1, False, []), (2, True, ["bias"]), (3, False, []), (4, True, ["bias"])]
    assert list(guard.outcomes(wait=False)) == told
    assert guard.pending == 0
    assert list(guard.outcomes(wait=True)) == []


def test_sums_of_a_skipped_steps_forward_passes_are_put_back() -> None:
    network, guard = linear()
    network.register_buffer("rows", torch.zeros(()), persistent=False)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    found = []
    for step, bias in ((1, 1.0), (2, math.nan), (3, 1.0)):
        take(guard, optimizer, step, bias, lambda: network.rows.add_(8))
        found.append(float(network.rows))
    assert found == [8, 8, 16]


def test_a_number_is_read_when_it_has_arrived() -> None:
    copy = HostCopy(torch.zeros(()))
    assert copy.is_here
    copy.arrival = SimpleNamespace(query=lambda: False, synchronize=lambda: copy.value.fill_(1))
    assert not copy.is_here
    assert copy.read() == 1
