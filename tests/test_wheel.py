"""A wheel of the package, installed where there is no checkout, is whole."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from test_journey import SHORT
from wheel_fixtures import CHECKOUT, run

pytest_plugins = ["wheel_fixtures"]


@pytest.mark.slow
@pytest.mark.smoke
def test_a_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    files = {path for name in ("sslvit", "configs") for path in (CHECKOUT / name).rglob("*") if path.is_file()}
    names = {str(path.relative_to(CHECKOUT)) for path in files if "__pycache__" not in path.parts}
    expected = {f"sslvit/{name}" if name.startswith("configs/") else name for name in names}
    assert {"sslvit/py.typed", "sslvit/configs/mae/digits.yaml", "sslvit/tasks/mae.py"} <= expected
    with zipfile.ZipFile(wheel) as file:
        assert {name for name in file.namelist() if not name.startswith("sslvit-")} == expected


@pytest.mark.slow
def test_an_installed_wheel_finds_its_recipes_and_runs_the_demo(installed: Path, tmp_path: Path) -> None:
    where = run(installed / "python", "-c", "import sslvit; print(sslvit.__file__)", cwd=tmp_path).strip()
    assert Path(where).is_relative_to(installed.parent)
    listed = run(installed / "sslvit", "recipes", cwd=tmp_path)
    recipes = [f"{file.parent.name}/{file.stem}" for file in CHECKOUT.glob("configs/*/*.yaml")]
    assert len(recipes) > 15
    assert all(recipe in listed for recipe in recipes if not recipe.startswith("bench/"))
    changes = [word for key, value in SHORT.items() for word in (f"--{key}", value)]
    said = run(installed / "sslvit", "demo", "--out", "demo", *changes, cwd=tmp_path)
    assert "Open these:" in said
    assert (tmp_path / "demo" / "report.html").exists()
    given = ["--data.cifar10.train", "demo/shards/train", "--data.cifar10.val", "demo/shards/test", "--encoders",
             "{MAE: demo/mae}", "--columns", "{kNN: knn}", "--baselines", "[pixels]", "--out", "tables"]  # fmt: skip
    run(installed / "sslvit", "bench", "cifar10_cpu", *given, cwd=tmp_path)
    assert "raw pixels" in (tmp_path / "tables" / "table.md").read_text()
    assert not (tmp_path / "configs").exists()
