"""Reads the fixtures in tests/golden: tensors, configuration and the tolerance of each.

A fixture is of use only as far as a test compares it, so every test that does says what it looks at (`looks_at`),
is held to it, and tests/test_golden.py fails where a tensor or a number is in no test's list.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sslvit.settings import EncoderSettings

FOLDER = Path(__file__).parent / "golden"


class Watched(Mapping):
    """A part of a fixture's JSON that notes which of its values were asked for.

    Args:
        values: the part.
        path: where it lies in the whole, as "config/vit/".
        seen: gets the paths of the values that are asked for.
    """

    def __init__(self, values: dict[str, Any], path: str, seen: set[str]) -> None:
        self.values_, self.path, self.seen = values, path, seen

    def __getitem__(self, key: str) -> Any:
        value = self.values_[key]
        if isinstance(value, dict):
            return Watched(value, f"{self.path}{key}/", self.seen)
        self.seen.add(f"{self.path}{key}")
        return value

    def __contains__(self, key: object) -> bool:
        return key in self.values_

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)


class Golden:
    """One fixture."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.tensors = load_file(FOLDER / f"{name}.safetensors")
        self.about = json.loads((FOLDER / f"{name}.json").read_text())
        self.seen: set[str] = set()
        self.config = Watched(self.about["config"], "config/", self.seen)
        self.info = Watched(self.about["info"], "info/", self.seen)

    def __getitem__(self, key: str) -> Tensor:
        value = self.tensors[key]
        self.seen.add(key)
        return value

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose keys start with a prefix, without it."""
        return {key.removeprefix(prefix): self[key] for key in self.tensors if key.startswith(prefix)}

    def keys_under(self, prefix: str) -> list[str]:
        return [key.removeprefix(prefix) for key in self.tensors if key.startswith(prefix)]

    def parts(self) -> list[str]:
        """Keys of all tensors, and the path of every value of the configuration and of the other results."""

        def paths(values: dict[str, Any], path: str) -> Iterator[str]:
            for key, value in values.items():
                yield from paths(value, f"{path}{key}/") if isinstance(value, dict) else [f"{path}{key}"]

        return [*self.tensors, *paths(self.about["config"], "config/"), *paths(self.about["info"], "info/")]

    def check(self, key: str, ours: Tensor) -> None:
        """Compare within the tolerance that the fixture states for this tensor; integers exactly."""
        expected = self[key].view(ours.shape) if ours.ndim == 0 else self[key]
        tolerance = self.about["tolerance"]
        if not expected.is_floating_point():
            assert torch.equal(ours.to(expected.dtype), expected), key
            return
        atol = tolerance.get("per_tensor_atol", {}).get(key)
        rtol = 0.0 if atol is not None else tolerance["rtol"]
        atol = tolerance["atol"] if atol is None else atol
        torch.testing.assert_close(ours, expected, atol=atol, rtol=rtol, msg=lambda text: f"{key}: {text}")


def looks_at(names: str | list[str], *patterns: str) -> Callable[[Callable], Callable]:
    """The test gets these fixtures, one at a time, as `golden`, and fails if it leaves out what it says it looks at.

    Args:
        names: of the fixtures. Written out, as the patterns are: tests/test_golden.py reads them in the source.
        patterns: of tensors' keys, "config/..." and "info/...", with * for any part.
    """

    def decorate(test: Callable) -> Callable:
        @functools.wraps(test)
        def run(golden: str, **others: Any) -> None:
            opened = Golden(golden)
            test(golden=opened, **others)
            named = [part for part in opened.parts() if any(fnmatchcase(part, pattern) for pattern in patterns)]
            missed = [part for part in named if part not in opened.seen]
            assert named, f"{golden} has none of {patterns}"
            assert not missed, f"{golden}: this test says that it looks at {missed}, and does not."

        return pytest.mark.parametrize("golden", [names] if isinstance(names, str) else names)(run)

    return decorate


def check_shape(config: Mapping, settings: EncoderSettings) -> None:
    """The official names of an architecture against settings that were read from its weights."""
    ours = {
        "patch_size": settings.patch, "embed_dim": settings.width, "depth": settings.depth,
        "num_heads": settings.heads, "mlp_ratio": settings.mlp_ratio,
    }  # fmt: skip
    assert settings.image_size == [config["img_size"]] * 2
    for key, value in ours.items():
        if key in config:
            assert value == config[key], key
