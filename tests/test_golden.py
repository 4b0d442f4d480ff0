"""Every tensor and every number of the fixtures is looked at by a quick test."""

from __future__ import annotations

import ast
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from golden_fixtures import FOLDER, Golden, looks_at

TESTS = Path(__file__).parent
FIXTURES = sorted(path.stem for path in FOLDER.glob("*.safetensors"))
LEFT_OUT = {"knn": {"config/noise"}}  # how inputs were drawn, which nothing that is computed from them depends on


def declared() -> dict[str, set[str]]:
    """Fixture -> patterns that quick tests look at, read in the source of all tests."""
    found: dict[str, set[str]] = {name: set() for name in FIXTURES}
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            marks = [ast.unparse(mark) for mark in node.decorator_list]
            if not node.name.startswith("test_") or any("mark.skip" in mark or "mark.slow" in mark for mark in marks):
                continue
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "looks_at":
                    names, *patterns = (ast.literal_eval(argument) for argument in mark.args)
                    for name in [names] if isinstance(names, str) else names:
                        found[name] |= set(patterns)
    return found


@pytest.mark.parametrize("name", FIXTURES)
def test_each_tensor_and_number_of_a_fixture_is_looked_at(name: str) -> None:
    patterns = declared()[name] | LEFT_OUT.get(name, set())
    golden = Golden(name)
    left_out = [part for part in golden.parts() if not any(fnmatchcase(part, pattern) for pattern in patterns)]
    assert not left_out, f"{name}: no test looks at {left_out}. Compare it, and name it in that test's looks_at."
    stated = {key: about["shape"] for key, about in golden.about["tensors"].items()}
    assert stated == {key: list(value.shape) for key, value in golden.tensors.items()}


def test_every_fixture_has_its_tensors_and_its_words() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.json")) == FIXTURES
    assert FIXTURES


def test_a_test_that_leaves_out_what_it_says_it_looks_at_fails() -> None:
    def looks(golden: Golden) -> None:
        assert golden.config["steps"] == 3
        assert golden["output/linprobe/step1/bias"].ndim == 1

    looks_at("lars", "config/steps", "output/linprobe/step1/bias")(looks)(golden="lars")
    with pytest.raises(AssertionError, match="looks at .*output/linprobe/step1/conv.*, and does not"):
        looks_at("lars", "output/linprobe/step1/*")(looks)(golden="lars")
    with pytest.raises(AssertionError, match="looks at .*config/runs/linprobe/lr.*, and does not"):
        looks_at("lars", "config/*")(looks)(golden="lars")
    with pytest.raises(AssertionError, match="has none of"):
        looks_at("lars", "output/nothing")(looks)(golden="lars")


def test_only_asking_for_a_value_counts_as_evaluating() -> None:
    golden = Golden("multi_crop")
    assert "batch" in golden.config
    assert golden.config["vit"]
    assert "head" in dict(golden.config)  # a copy asks for all on its first level
    assert golden.seen == {"config/batch", "config/crop_sizes"}
    assert golden.keys_under("param/")
    assert golden.seen == {"config/batch", "config/crop_sizes"}
    assert golden.under("param/")
    assert len(golden.seen) == 2 + len(golden.keys_under("param/"))
