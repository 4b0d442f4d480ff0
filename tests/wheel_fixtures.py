"""A wheel of the package, and an environment that has it instead of the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

CHECKOUT = Path(__file__).parents[1]
SOURCES = ("sslvit", "configs", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")


def run(*command: object, cwd: Path, **variables: str) -> str:
    """What a command prints, in an environment where no variable of Python points at the checkout."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")} | variables
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
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
