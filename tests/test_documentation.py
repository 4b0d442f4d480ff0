"""Every command and every snippet of the README and of docs/ runs as it stands there, from a wheel, in an empty folder.

Runs are shortened by $SSLVIT_MAX_STEPS and by nothing else. Photographs are two of scikit-learn's, cut into pieces;
$PHOTOS may name a folder of class folders instead, and $CIFAR10 an archive with the folder cifar10/train.
"""

from __future__ import annotations

import ast
import importlib
import io
import os
import re
import shlex
import shutil
import tarfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from documentation import PAGES, ROOT, Snippet, snippets_of
from hub_fixtures import Hub
from PIL import Image
from wheel_fixtures import run

import sslvit
from sslvit.cli import read_command

pytest_plugins = ["wheel_fixtures"]

STEPS = "2"
THUMBNAILS = 12  # of each photograph
# what cannot be typed here: (page, how it begins, why)
EXCEPTIONS = [
    ("README.md", "git clone", "the address is the reader's; a clone is where these tests come from"),
    ("README.md", "make ", "the two commands that set up this environment and run the tests"),
    ("README.md", "pip install", "reads a package index"),
    ("cluster.md", "sbatch", "a cluster; tests/test_slurm.py runs the script with stubs"),
    ("cluster.md", "torchrun --nnodes 2", "two machines of eight GPUs; two hosts run in tests/train/test_two_hosts.py"),
    ("cluster.md", "python tools/two_hosts", "network namespaces; tests/train/test_two_hosts.py"),
    ("cluster.md", "sslvit replay", "a run that failed; tests/train/test_incidents.py"),
    ("data.md", "sslvit shards pack photos/ shards/photos --part", "64 jobs of a cluster; tests/data/test_pack.py"),
    ("data.md", "sslvit shards index --merge", "likewise"),
    (
        "data.md",
        "sslvit shards pack torchvision:",
        "downloads; tests/data/test_dataset_source.py packs such files",
    ),
    ("data.md", "sslvit shards pack hf:", "likewise"),
    ("data.md", "sslvit shards pack saved/", "an optional library; likewise"),
    ("dino.md", "import sslvit", "released weights; tests/test_released_files.py makes such files"),
    ("mae.md", "import sslvit", "likewise"),
    ("igpt.md", "import sslvit", "likewise"),
    ("igpt.md", "reader = tf.", "TensorFlow"),
    ("igpt.md", "sslvit pretrain --config igpt/small_cifar10 ...", "an ellipsis"),
    ("export.md", "sslvit import", "released weights"),
    ("evaluation.md", "torchrun", "eight GPUs; two ranks probe in tests/evaluate/test_probe_table.py"),
    ("runs.md", "sslvit branch", "a step that runs of two steps do not reach; tests/train/test_branch.py"),
    ("runs.md", "sslvit resume runs/short", "likewise"),
    ("performance.md", "pip", "wheels for another machine's Python"),
    ("performance.md", "python", "benchmarks of hours, and a GPU; tests/test_device_day.py"),
]
PRELUDE = {"lightning.md": "import torch\ndataset = [(torch.randn(3, 32, 32), 0)] * 128\n"}


def is_exception(snippet: Snippet) -> bool:
    return any(snippet.page == page and snippet.text.startswith(start) for page, start, _ in EXCEPTIONS)


def test_every_exception_is_still_written_down() -> None:
    found = [snippet for page in PAGES for snippet in snippets_of(page)]
    for page, start, why in EXCEPTIONS:
        assert any(one.page == page and one.text.startswith(start) for one in found), (page, start)
        assert all((ROOT / file).exists() for file in re.findall(r"tests/[\w/]+\.py", why)), why


class World:
    """A reader's folder, with what a page takes for granted: images, shards and runs that other pages make."""

    def __init__(self, folder: Path, tools: Path) -> None:
        self.folder, self.tools, self.hub = folder, tools, Hub()
        self.supplied: set[str] = set()
        photographs(folder / "photos")
        thumbnails(folder / "photos", folder / "cifar10.tar.gz")
        for name in ("docs", "tools", "configs"):
            (folder / name).symlink_to(ROOT / name)

    def type(self, command: str) -> str:
        """Run a command in the folder as a shell does."""
        return run("bash", "-c", command, cwd=self.folder, SSLVIT_MAX_STEPS=STEPS, SLURM_ARRAY_TASK_ID="1",
                   PATH=f"{self.tools}:{os.environ['PATH']}", XDG_CACHE_HOME=str(self.folder / "cache"),
                   HF_ENDPOINT=self.hub.address, HF_TOKEN=Hub.TOKEN, HF_HOME=str(self.folder / "hub"))  # fmt: skip

    def provide(self, text: str, makes: str = "") -> None:
        """Make what a text, and the bench that it names, reads and nobody has made, and give way where it is made here.

        Args:
            text: A command, a block of Python, or a bench.
            makes: The path that it supplies, if it is not the reader's.
        """
        for bench in re.findall(r"bench (?:bench/)?(\w+)$", text, re.MULTILINE):
            lines = (ROOT / "configs" / "bench" / f"{bench}.yaml").read_text().splitlines()
            self.provide("\n".join(line for line in lines if not line.startswith("#")))
        for path, make in SUPPLIES.items():
            is_made_here = path == makes or re.search(rf"(--out |-o |pack \S+ |out=\"){re.escape(path)}\b", text)
            if is_made_here and path in self.supplied and not makes:
                self.supplied.remove(path)
                shutil.rmtree(self.folder / path)
            is_there = is_made_here or (self.folder / path).exists()
            if re.search(rf"(?<![\w./-]){re.escape(path)}(?![\w-])", text) and not is_there:
                self.provide(make, path)
                self.type(make)
                self.supplied.add(path)


SMALL = "--encoder.width 32 --encoder.depth 2 --encoder.heads 2"
PIXELS = f"{SMALL} --encoder.image_size 8"
PHOTOS = "--train shards/photos/train --val shards/photos/val"


def pretrained(recipe: str, data: str, out: str, more: str = SMALL) -> str:
    return f"sslvit pretrain --config {recipe} {more} --data {data} --out {out}"


# path -> the command that makes it
SUPPLIES = {
    "shards/photos": "sslvit shards pack photos/ shards/photos --holdout 0.1",
    "cifar10/train": "tar xzf cifar10.tar.gz",
    "shards/cifar10": "sslvit shards pack cifar10/train shards/cifar10 --holdout 0.1",
    "shards/vehicles": "sslvit shards pack cifar10/train shards/vehicles",
    "shards/animals": "sslvit shards pack cifar10/train animals --holdout 0.2 && mkdir -p shards && "
    "mv animals/train shards/animals && mv animals/val shards/animals-val",
    "shards/imagenet": "sslvit shards pack photos/ shards/imagenet --holdout 0.1",
    "shards/train": "sslvit shards pack photos/ shards/train --encode png",
    "shards/theirs": "sslvit shards pack photos/ shards/theirs && rm shards/theirs/index.*",
    "dog.jpg": 'cp "$(ls photos/*/* | head -n 1)" dog.jpg',
    "cat.jpg": 'cp "$(ls photos/*/* | tail -n 1)" cat.jpg',
    "list.csv": "(echo path,label; ls photos/*/* | sed 's/.*/&,a/') > list.csv",
    "digits.npz": 'python -c "import numpy as np; from sklearn.datasets import load_digits; d = load_digits(); '
    "np.savez('digits.npz', images=(d.images * 15).astype(np.uint8), labels=d.target)\"",
    "images.npz": "python -c \"import numpy as np; np.savez('images.npz', x=np.zeros((9, 8, 8, 3), np.uint8))\"",
    "runs/photos": pretrained(
        "mae/vit_tiny_cifar10", "shards/photos/train", "runs/photos", f"{SMALL} --data.ledger true"
    ),
    "runs/mae-cifar10": pretrained("mae/vit_tiny_cifar10", "shards/cifar10/train", "runs/mae-cifar10"),
    "runs/dino-cifar10": pretrained("dino/vit_tiny_cifar10", "shards/cifar10/train", "runs/dino-cifar10"),
    "runs/igpt-cifar10": pretrained("igpt/small_cifar10", "shards/cifar10/train", "runs/igpt-cifar10", PIXELS),
    "runs/igpt": pretrained("igpt/small_cifar10", "shards/photos/train", "runs/igpt", PIXELS),
    "runs/finetuned": f"sslvit finetune runs/photos {PHOTOS} --out runs/finetuned",
}


def photographs(folder: Path) -> None:
    """Two class folders of photographs: pieces of scikit-learn's two, or those of $PHOTOS."""
    if given := os.environ.get("PHOTOS"):
        shutil.copytree(given, folder)
        return
    from sklearn.datasets import load_sample_images

    source = np.random.default_rng(0)
    for name, whole in zip(("pagoda", "flower"), load_sample_images().images, strict=True):
        (folder / name).mkdir(parents=True)
        for number in range(12):
            top, left = source.integers(0, 120), source.integers(0, 140)
            Image.fromarray(whole[top : top + 300, left : left + 500]).save(folder / name / f"{number:02}.jpg")


def thumbnails(photos: Path, archive: Path) -> None:
    """Class folders of images of 32 x 32 pixels in an archive, or that of $CIFAR10."""
    if given := os.environ.get("CIFAR10"):
        shutil.copy(given, archive)
        return
    with tarfile.open(archive, "w:gz") as tar:
        for path in sorted(photos.glob("*/*")):
            whole = Image.open(path).convert("RGB")
            for number in range(THUMBNAILS):
                left = number * (whole.width - whole.height) // THUMBNAILS
                content = io.BytesIO()
                whole.crop((left, 0, left + whole.height, whole.height)).resize((32, 32)).save(content, "PNG")
                member = tarfile.TarInfo(f"cifar10/train/{path.parent.name}/{path.stem}-{number}.png")
                member.size = len(content.getvalue())
                tar.addfile(member, io.BytesIO(content.getvalue()))


@pytest.fixture
def world(installed: Path, tmp_path: Path) -> World:
    return World(tmp_path, installed)


def parts_of(page: Path) -> Iterator[Snippet]:
    yield from (snippet for snippet in snippets_of(page) if not is_exception(snippet))


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if list(parts_of(page))], ids=lambda page: page.name)
def test_a_page_runs_as_it_is_written(page: Path, world: World) -> None:
    python = PRELUDE.get(page.name, "")
    for snippet in parts_of(page):
        world.provide(snippet.text)
        if snippet.is_python:
            python += f"{'#' * 20} {snippet.page}, line {snippet.line}\n{snippet.text}"
        else:
            world.type(snippet.text)
    (world.folder / "snippets.py").write_text(f"{python}")
    world.type("python snippets.py")


@pytest.mark.parametrize("page", sorted(
    str(page.relative_to(ROOT)) for page in [*PAGES, *ROOT.glob("docs/learn/*.md"), *ROOT.glob("docs/examples/*.py")]
))  # fmt: skip
def test_names_that_a_page_imports_exist(page: str) -> None:
    """Those of the package, also in snippets that cannot be run here."""
    path = ROOT / page
    blocks = [path.read_text()] if path.suffix == ".py" else [one.text for one in snippets_of(path) if one.is_python]
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sslvit":
                module = importlib.import_module(node.module or "")
                for name in node.names:
                    is_module = hasattr(module, "__path__") and find_spec(f"{node.module}.{name.name}")
                    assert is_module or hasattr(module, name.name), f"{page}: {node.module} has no {name.name}"
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sslvit":
                assert hasattr(sslvit, node.attr), f"{page}: sslvit has no {node.attr}"


@pytest.mark.parametrize("page", sorted(str(page.relative_to(ROOT)) for page in [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("docs/learn/*.md")
]))  # fmt: skip
def test_commands_within_sentences_are_well_formed(page: str, capsys: pytest.CaptureFixture) -> None:
    """They may leave out what the sentence is not about; blocks are typed in full by the slow tests."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    for span in re.findall(r"`sslvit ([^`]+)`", text):
        try:
            read_command(shlex.split(span))
        except SystemExit:
            assert re.search(r"arguments are required|expected one argument$", capsys.readouterr().err.strip()), span
