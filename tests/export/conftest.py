"""Programs are traced without the checks of shapes."""

from __future__ import annotations

from collections.abc import Iterator

import jaxtyping
import pytest

from sslvit.exporters import torch as program


@pytest.fixture(autouse=True)
def sizes_may_be_symbols(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Shapes are checked in every test, but not while a program for any size is traced: there a size is a symbol."""
    trace = program.trace

    def unchecked(*args):
        jaxtyping.config.update("jaxtyping_disable", True)
        try:
            return trace(*args)
        finally:
            jaxtyping.config.update("jaxtyping_disable", False)

    monkeypatch.setattr(program, "trace", unchecked)
    return
