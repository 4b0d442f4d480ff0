"""The time to fit heads on given features: logistic regression against scikit-learn's, a grid of heads against one.

    python tools/benchmarks/probes.py [--threads 1] [--images 50000] [--width 192]

Features are random, but correlated like an encoder's and partly separable, so nothing has to be downloaded. The ratios
are what counts, since the seconds depend on the machine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from sslvit.evaluate.logistic import fit_logistic
from sslvit.evaluate.sgd_probe import HeadGrid, iterate_batches
from sslvit.evaluate.sources import FeatureTable, Readout
from sslvit.settings.protocols import DINOv2ProbeSettings

CLASSES = 10
BATCH = 1024
STEPS = 200


def make_features(images: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Make standardized random features and labels."""
    source = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (images,), generator=source)
    basis = torch.randn(width, width, generator=source) * torch.logspace(0, -2, width)[:, None]
    means = 0.15 * torch.randn(CLASSES, width, generator=source)
    values = (torch.randn(images, width, generator=source) + means[labels]) @ basis
    return (values - values.mean(0)) / values.std(0), labels


def timed(work: Callable[[], object], repeats: int = 3) -> tuple[float, object]:
    """Shortest of several calls in seconds, and the last result."""
    best, result = float("inf"), None
    for _ in range(repeats):
        start = time.perf_counter()
        result = work()
        best = min(best, time.perf_counter() - start)
    return best, result


def logistic(images: int, width: int) -> None:
    values, labels = make_features(images, width)
    values = values.double()
    for c in (1.0, 1.0 / images / 1e-3):  # scikit-learn's default, and a stronger penalty
        strength = 1 / (c * images)
        ours, (weight, bias, _) = timed(
            lambda strength=strength: fit_logistic(values, labels, CLASSES, torch.tensor([strength]).double())
        )
        theirs, model = timed(
            lambda c=c: LogisticRegression(C=c, max_iter=10_000).fit(values.numpy(), labels.numpy()), repeats=1
        )

        def loss(w: Tensor, b: Tensor, strength: float = strength) -> float:
            return float(F.cross_entropy(values @ w.T + b, labels) + strength / 2 * w.square().sum())

        one, other = loss(weight[0], bias[0]), loss(torch.tensor(model.coef_), torch.tensor(model.intercept_))
        print(
            f"logistic regression, {images:,} x {width}, penalty {strength:.0e}: {ours:.2f} s; scikit-learn "
            f"{theirs:.2f} s, {theirs / ours:.1f} times as long; loss {one:.6f} and {other:.6f} "
            f"({(one - other) / other:+.1e} relative)"
        )


def grid(images: int, width: int) -> None:
    readouts: list[Readout] = [(9, "class"), (10, "class"), (11, "class"), (12, "class"), (12, "mean")]
    values, labels = make_features(images, width * len(readouts))
    table = FeatureTable(
        dict(zip(readouts, values.chunk(len(readouts), 1), strict=True)), labels, torch.arange(len(labels))
    )
    features = [[readouts[3]], readouts[3:], readouts[:4], readouts]
    lrs = [lr * BATCH / 256 for lr in DINOv2ProbeSettings().lrs]

    def fit(chosen: list[list[Readout]], some_lrs: list[float]) -> None:
        order = sorted({readout for part in chosen for readout in part})
        heads = HeadGrid(chosen, width, some_lrs, CLASSES)
        epochs = iter([table] * (STEPS * BATCH // images + 1))
        heads.fit(iterate_batches(epochs, order, None, BATCH, STEPS, 0), lambda step: 1.0)

    one, _ = timed(lambda: fit([readouts], lrs[:1]))
    all_of_them, _ = timed(lambda: fit(features, lrs))
    print(
        f"{len(features)} features x {len(lrs)} learning rates, {STEPS} steps of {BATCH}: {all_of_them:.2f} s; one "
        f"head on the widest feature {one:.2f} s: {all_of_them / one:.2f} times as long for "
        f"{len(features) * len(lrs)} heads"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=192)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logistic(options.images, options.width)
    grid(options.images, options.width)
