"""Faults in scores."""

from __future__ import annotations

from faults import Fault

FAULTS = [
    Fault(
        "The temperature of the kNN vote is ignored",
        "sslvit/evaluate/knn.py",
        "[:, :1]) / temperature).exp()",
        "[:, :1]) / 0.07).exp()",
        ("tests/evaluate/test_probes.py",),
    ),
]
