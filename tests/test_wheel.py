"""A wheel of the package, installed where there is no checkout, is whole."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from test_journey import SHORT

CHECKOUT = Path(__file__).parents[1]
SOURCES = ("sslvit", "configs", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")


def run(*command: object, cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since a build leaves folders behind, and finds those of earlier ones."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    for name in SOURCES:
        if (CHECKOUT / name).is_dir():
            shutil.copytree(CHECKOUT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(CHECKOUT / name, folder / "source")
    offline = ("--no-index", "--no-build-isolation", "--check-build-dependencies", "--no-cache-dir")
    run(sys.executable, "-m", "pip", "wheel", "./source", "--no-deps", *offline, "-w", folder / "wheels", cwd=folder)
    (file,) = (folder / "wheels").iterdir()
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a new environment: the wheel, and the dependencies of this one.

    A .pth file names their folder; other .pth files in there, such as that of an editable install, are not followed.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    (packages / "dependencies.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--no-index", "--no-deps", "--ignore-installed", wheel, cwd=folder)
    return folder / "bin"


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
