"""Shared by the lessons: digits, a short training loop, and stored numbers that take a laptop too long to compute."""

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
FULL = "LEARN_FULL"  # environment variable: recompute and replace the stored numbers of the lessons
SMALL = {"image_size": 8, "channels": 1, "patch": 2, "width": 48, "depth": 3, "heads": 4, "class_token": False,
         "pooling": "mean"}  # fmt: skip


class Digits(NamedTuple):
    """scikit-learn's handwritten digits, 8 x 8 pixels.

    Attributes:
        train: Normalized images 'b 1 8 8', with mean 0.5 and standard deviation 0.25.
        train_labels: Labels of `train`, 'b'.
        test: Images that no lesson trains on: every fifth of the set.
        test_labels: Labels of `test`.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def digits() -> Digits:
    """Load 1,437 digits for training and 360 for testing."""
    found = load_digits()
    images = (torch.from_numpy(found.images).float()[:, None] / 16 - 0.5) / 0.25
    labels, is_test = torch.from_numpy(found.target).long(), torch.arange(len(images)) % 5 == 0
    return Digits(images[~is_test], labels[~is_test], images[is_test], labels[is_test])


def small(**changes: Any) -> EncoderSettings:
    """Settings of an encoder with 0.1 M parameters for the digits: patches of 2 x 2, width 48, 3 blocks."""
    return EncoderSettings(**SMALL | changes)


def classifier(seed: int = 0, classes: int = 10, **changes: Any) -> Classifier:
    """A small encoder with a linear head and random weights."""
    torch.manual_seed(seed)
    return Classifier(small(**changes), classes)


def train(
    network: nn.Module, images: Tensor, labels: Tensor, steps: int = 400, batch: int = 128, lr: float = 3e-3,
    seed: int = 0,
) -> list[float]:  # fmt: skip
    """Minimize the cross-entropy by AdamW with warm-up and cosine decay; returns the loss of each step."""
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
    """Return an experiment's numbers from docs/learn/numbers, or compute and store them with LEARN_FULL=1.

    Args:
        name: Name of the file.
        experiment: Function that returns values for JSON.
    """
    path = NUMBERS / f"{name}.json"
    if os.environ.get(FULL) or not path.is_file():
        path.write_text(json.dumps(experiment(), indent=1) + "\n")
    return json.loads(path.read_text())
