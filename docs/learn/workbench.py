"""What the lessons share: digits, a short training loop, and numbers that take a laptop too long."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from sslvit.models.classifier import Classifier
from sslvit.optim import warmup_cosine
from sslvit.settings import EncoderSettings

HERE = Path(__file__).parent
FIGURES, NUMBERS = HERE / "figures", HERE / "numbers"
FULL = "LEARN_FULL"  # environment variable: compute the numbers that the lessons bring along, and replace them
SMALL = {"image_size": 8, "channels": 1, "patch": 2, "width": 48, "depth": 3, "heads": 4, "class_token": False,
         "pooling": "mean"}  # fmt: skip


class Digits(NamedTuple):
    """scikit-learn's handwritten digits, 8 x 8 pixels.

    Attributes:
        train: Normalized images 'b 1 8 8': gray 0.5 is 0, and a quarter of the range is 1.
        train_labels: Their digits, 'b'.
        test: Images that no lesson trains on, every fifth of the set.
        test_labels: Their digits.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def digits() -> Digits:
    """1,437 digits to learn from, and 360 to test on."""
    found = load_digits()
    images = (torch.from_numpy(found.images).float()[:, None] / 16 - 0.5) / 0.25
    labels, is_test = torch.from_numpy(found.target).long(), torch.arange(len(images)) % 5 == 0
    return Digits(images[~is_test], labels[~is_test], images[is_test], labels[is_test])


def small(**changes: Any) -> EncoderSettings:
    """An encoder of 0.1 M parameters for the digits: patches of 2 x 2, width 48, 3 blocks; `changes` are settings."""
    return EncoderSettings(**SMALL | changes)


def classifier(seed: int = 0, classes: int = 10, **changes: Any) -> Classifier:
    """A small encoder with a linear head, from random weights."""
    torch.manual_seed(seed)
    return Classifier(small(**changes), classes)


def train(
    network: nn.Module, images: Tensor, labels: Tensor, steps: int = 400, batch: int = 128, lr: float = 3e-3,
    seed: int = 0,
) -> list[float]:  # fmt: skip
    """Minimize the cross-entropy by AdamW with a warm-up and a cosine; returns the loss of each step."""
    optimizer, order = torch.optim.AdamW(network.parameters()), torch.Generator().manual_seed(seed)
    losses = []
    network.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = warmup_cosine(step, lr, 0.0, steps // 10, steps)
        rows = torch.randint(len(images), (batch,), generator=order)
        loss = F.cross_entropy(network(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    network.eval()
    return losses


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy in percent."""
    return 100 * (network(images).argmax(1) == labels).float().mean().item()


def measured(name: str, experiment: Callable[[], Any]) -> Any:
    """What an experiment gives: the numbers that lie in docs/learn/numbers, or new ones with LEARN_FULL=1.

    Args:
        name: Name of the file.
        experiment: Gives what JSON can hold.
    """
    path = NUMBERS / f"{name}.json"
    if os.environ.get(FULL) or not path.is_file():
        path.write_text(json.dumps(experiment(), indent=1) + "\n")
    return json.loads(path.read_text())
