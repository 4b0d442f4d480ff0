"""The house's rules as code: imports flow one way, and looking at the front door costs no torch."""

from __future__ import annotations

import ast
import configparser
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sslvit"

# a room imports from lower numbers only; data and models stand side by side
ROOMS = {
    "messages": -3, "files": -2, "results": -1, "plugins": -1, "locks": -1, "settings": 0, "rng": 0,
    "run_plan": 0.5, "palette": 0, "figures": 0, "progress": 0.5, "environment": 0, "ranks": 0, "stopping": 0,
    "data": 1, "models": 1, "weight_files": 2,
    "sharded_checkpoint": 3, "optim": 3, "compatibility": 3, "layouts": 4, "zoo": 4, "checkpoint": 5,
    "tasks": 6, "evaluate": 7, "pages": 7.5,
    "train": 8, "exporters": 9, "api": 9.5, "evaluation": 9,
    "pixel_models": 9, "shards": 9, "reports": 10, "segmentation": 10.5, "commands": 11, "cli": 12, "__main__": 13,
}  # fmt: skip


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "sslvit" else [f"sslvit.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("sslvit.")}
    return rooms - {"__version__"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_imports_only_from_its_own_and_lower_rooms(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return
    upward = [other for other in imported_rooms(path) if other != room and ROOMS[other] >= ROOMS[room]]
    assert not upward, f"{room} ({ROOMS[room]}) imports {upward}"


def modules_after(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}; print(' '.join(sys.modules))"],
        capture_output=True, text=True, check=True, cwd=PACKAGE.parent,
    )  # fmt: skip
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import sslvit",
        "import sslvit.settings",
        "import sslvit.cli; sslvit.cli.make_parser()",
        "from sslvit.settings.load import load_recipe; load_recipe('mae/digits')",
        "import sslvit.cli; sslvit.cli.main(['recipes', '--json'])",
    ],
)
def test_the_front_door_imports_no_torch(code: str) -> None:
    assert "torch" not in modules_after(code)


def test_every_folder_of_the_package_is_installed() -> None:
    config = configparser.ConfigParser()
    config.read(PACKAGE.parent / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    folders = {".".join(p.parent.relative_to(PACKAGE.parent).parts) for p in PACKAGE.rglob("__init__.py")}
    assert listed == folders | {"sslvit.configs"}


def test_lazy_names_exist() -> None:
    import sslvit

    for name in sslvit._LAZY:
        assert getattr(sslvit, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'MEA'"):
        _ = sslvit.MEA


def test_shapes_are_checked_in_every_file_that_names_them() -> None:
    tree = ast.parse((PACKAGE.parent / "tests" / "conftest.py").read_text())
    (listed,) = [
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SHAPED"
    ]
    named = [path for path in PACKAGE.rglob("*.py") if "from jaxtyping import" in path.read_text()]
    modules = {".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in named}
    assert modules
    assert not [module for module in modules if not module.startswith(tuple(ast.literal_eval(listed)))]


WRONG = {  # what is typed -> what the answer says
    "pretrain --config mae/digits --train.stps 5": "train.steps?",
    "pretrain --config mae/digits --optim.base_lr -1": "optim.base_lr: -1",
    "pretrain --config mae/digts": "mae/digits",
    "finetune RUN --train a --val b --out c --train.stps 5": "train.steps?",
    "finetune RUN --train a --val b --out c --encoder.wdth 5": "encoder.width?",
    "finetune RUN --train a --val b --out c --encoder.width many": "encoder.width: expected int",
    "finetune RUN --train a --val b --out c --task.smoothing 2": "task.smoothing",
    "finetune RUN --train a --val b --out c --config finetune/small": "finetune/small_images",
    "resume RUN --train.stps 5": "train.steps?",
    "resume RUN --train.steps many": "train.steps: expected int",
    "plan --config mae/digits --images 9 --train.stps 5": "train.steps?",
    "probe RUN --train a --val b --protocol.epcohs 5": "protocol",
    "probe RUN --train a --val b --protocl mae": "--protocol?",
    "probe RUN --train a --val b --protocol mea": "mae?",
    "sample RUN --cuont 5": "--count?",
    "sample RUN --count many": "--count: expected int",
    "bench bench/cifar10 --sedes 5": "seeds?",
    "bench bench/cifra10": "bench/cifar10",
    "bench BENCH": "columns.tuned: train.stps",
    "bench GONE": "not there: encoders.e (gone/e), data.d.val (gone/v). Make them first",
    "demo --train.stps 5": "train.steps?",
    "demo --data digit": "digits?",
}


def test_what_is_typed_wrong_is_answered_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("task: mae")
    (tmp_path / "bench.yaml").write_text(
        "data: {d: {train: a, val: b}}\nencoders: {e: RUN}\ncolumns: {tuned: {kind: finetune, train.stps: 3}}"
    )
    (tmp_path / "gone.yaml").write_text(
        f"data: {{d: {{train: {tmp_path}, val: gone/v}}}}\nencoders: {{e: gone/e, f: 'timm:f'}}\ncolumns: {{kNN: knn}}"
    )
    places = {"RUN": str(tmp_path), "BENCH": str(tmp_path / "bench.yaml"), "GONE": str(tmp_path / "gone.yaml")}
    typed = [[places.get(word, word) for word in line.split()] for line in WRONG]
    code = (
        "import contextlib, io, json, sys\nfrom sslvit.cli import main\nanswers = []\n"
        f"for words in {typed!r}:\n"
        "    with contextlib.redirect_stderr(io.StringIO()) as error:\n"
        "        code = main(words)\n"
        "    answers.append([code, error.getvalue(), 'torch' in sys.modules])\n"
        "print(json.dumps(answers))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    for (line, expected), (exit_code, error, has_torch) in zip(WRONG.items(), json.loads(done.stdout), strict=True):
        assert expected in error, f"{line}: {error}"
        assert (exit_code, has_torch) == (1, False), line


def test_the_map_names_every_file() -> None:
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    drawn = page.partition("```")[2].partition("```")[0]
    files = {path.name for path in PACKAGE.rglob("*.py") if not path.name.startswith("__")}
    assert files - set(re.findall(r"\w+\.py", drawn)) == set()
    assert set(re.findall(r"\w+\.py", drawn)) - files == {"__init__.py", "__main__.py", "device_day.py"}


DISTRIBUTIONS = {
    "pytorch_lightning": "pytorch-lightning", "lightning_fabric": "pytorch-lightning", "yaml": "pyyaml",
    "PIL": "pillow", "sklearn": "scikit-learn",
}  # fmt: skip


def imported(nodes: Iterable[ast.AST]) -> set[str]:
    """Distributions that some statements import."""
    names = {(node.module or "") for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0}
    names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    roots = {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"sslvit"}
    return {DISTRIBUTIONS.get(name, name) for name in roots}


def test_the_package_installs_what_it_imports() -> None:
    """What an extra brings is imported where it is needed, behind a message that names the extra."""
    config = configparser.ConfigParser()
    config.read(PACKAGE.parent / "setup.cfg")
    installed = {re.split(r"[<>=]", line)[0] for line in config["options"]["install_requires"].split()}
    trees = [ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")]
    assert imported([node for tree in trees for node in tree.body]) <= installed
    lightning_imports = {"wandb"}
    assert installed <= imported([node for tree in trees for node in ast.walk(tree)]) | lightning_imports
