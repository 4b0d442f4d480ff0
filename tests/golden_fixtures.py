"""Reads the fixtures in tests/golden: tensors, configuration and the tolerance of each."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"


class Golden:
    """One fixture."""

    def __init__(self, name: str) -> None:
        self.tensors = load_file(FOLDER / f"{name}.safetensors")
        self.about = json.loads((FOLDER / f"{name}.json").read_text())
        self.config = self.about["config"]

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose keys start with a prefix, without it."""
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}

    def keys_under(self, prefix: str) -> list[str]:
        return list(self.under(prefix))

    def check(self, key: str, ours: Tensor) -> None:
        """Compare within the tolerance that the fixture states for this tensor; integers exactly."""
        expected = self.tensors[key].view(ours.shape) if ours.ndim == 0 else self.tensors[key]
        tolerance = self.about["tolerance"]
        if not expected.is_floating_point():
            assert torch.equal(ours.to(expected.dtype), expected), key
            return
        atol = tolerance.get("per_tensor_atol", {}).get(key)
        rtol = 0.0 if atol is not None else tolerance["rtol"]
        atol = tolerance["atol"] if atol is None else atol
        torch.testing.assert_close(ours, expected, atol=atol, rtol=rtol, msg=lambda text: f"{key}: {text}")
