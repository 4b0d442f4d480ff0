"""A setting that is one of a few words refuses others, in Python as in a recipe."""

from __future__ import annotations

import importlib
import pkgutil
import typing
from dataclasses import MISSING, fields, is_dataclass

import pytest

import sslvit.settings
from sslvit.settings import EncoderSettings, ProbeSettings
from sslvit.settings.load import build


def fields_of_few_words() -> list[tuple[type, str]]:
    """Every field of every settings dataclass that is a Literal."""
    found = []
    for module in pkgutil.iter_modules(sslvit.settings.__path__, "sslvit.settings."):
        for kind in vars(importlib.import_module(module.name)).values():
            if isinstance(kind, type) and is_dataclass(kind) and kind.__module__ == module.name:
                hints = typing.get_type_hints(kind)
                found += [(kind, key) for key, hint in hints.items() if "Literal" in str(hint)]
    return found


def needed(kind: type) -> dict:
    """Values for the fields that have no default."""
    return {f.name: "x" for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}


def test_the_list_of_such_fields_is_found() -> None:
    assert len(fields_of_few_words()) > 30
    assert (EncoderSettings, "pos_embed") in fields_of_few_words()


@pytest.mark.parametrize(("kind", "key"), fields_of_few_words(), ids=lambda value: getattr(value, "__name__", value))
def test_other_words_are_refused(kind: type, key: str) -> None:
    with pytest.raises(ValueError, match=rf"{key}: 'rotary_1d' is not one of "):
        kind(**needed(kind) | {key: "rotary_1d"})


def test_the_message_is_that_of_a_recipe() -> None:
    with pytest.raises(ValueError, match="is not one of") as in_python:
        EncoderSettings(pos_embed="rotary_1d")
    with pytest.raises(ValueError, match="is not one of") as in_a_recipe:
        build(EncoderSettings, {"pos_embed": "rotary_1d"})
    assert str(in_python.value) == f"encoder.{in_a_recipe.value}"
    with pytest.raises(ValueError, match="--device: null is not one of auto, cpu, cuda"):
        ProbeSettings("a", "b", device=None)
