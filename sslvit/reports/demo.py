"""`sslvit demo`: packing, pretraining, probing and exporting on real images, in minutes on a laptop."""

from __future__ import annotations

import json
import logging
import math
import shutil
import tarfile
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sslvit.checkpoint import load_encoder
from sslvit.data.array_images import array_samples
from sslvit.data.folders import folder_source
from sslvit.data.index import ShardIndex
from sslvit.data.pack import pack
from sslvit.data.sources import Samples, hold_out
from sslvit.data.views import Views
from sslvit.environment import cpu_cores, require_packages
from sslvit.evaluate.layers import HELD_OUT, LayerTable, plot_layers, probe_layers
from sslvit.evaluate.probe import LINEAR, ProbeTable, probe
from sslvit.evaluate.scores import intervals
from sslvit.exporters import export_encoder
from sslvit.figures import plot_bars, plot_curves
from sslvit.files import to_json, write_atomically
from sslvit.locks import is_locked
from sslvit.models import Encoder
from sslvit.pages.page import heading, picture, table, text, write_page
from sslvit.reports.side_by_side import pretrain_side_by_side
from sslvit.settings import MAESettings, ProbeSettings
from sslvit.settings.demo import CIFAR10_ON_A_CPU, RECIPES, split_changes
from sslvit.settings.load import load_recipe
from sslvit.train.folder import LOCK, RunFolder
from sslvit.train.run import pretrain

logger = logging.getLogger(__name__)

TASKS = {"mae": "masked autoencoder", "dino": "self-distillation", "igpt": "next-pixel prediction"}
NAMES = {"mae": "MAE", "dino": "DINO", "igpt": "iGPT"}
MARK = "demo.json"  # marks the folder of a demo
FOLDERS = ("shards", "download", *TASKS, "export", "figures")
TEST_EVERY = 5  # one in five digits is a test image
# steps between scores of the features during pretraining: about six scores per run, the last at its end
ONLINE_EVERY = {"digits": {"mae": 330, "dino": 200, "igpt": 250}, "cifar10": {"mae": 200, "dino": 50, "igpt": 150}}
ONLINE_IMAGES = 1500
EVALUATION_SEED = 1  # of the digits' positions for evaluation; training samples positions from the run's seed


def demo(
    data: str = "digits", archive: str | None = None, out: str = "runs/demo", overwrite: bool = False, seed: int = 0,
    changes: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Run the demo, report what to open, and return the table.

    Args:
        data: digits (scikit-learn's, no download) or cifar10.
        archive: For cifar10, a local archive instead of a download: cifar-10-python.tar.gz, or a tar file of class
            folders of images.
        out: Folder for all results.
        overwrite: Replace an earlier demo in the folder.
        seed: Seed of weights, order, crops and masks.
        changes: Settings that differ from the recipes'; each task uses those that apply to it.

    Raises:
        ValueError: The data set is unknown, the folder is in use, or the archive is of another kind.
    """
    start = time.monotonic()
    folder = Path(out)
    if data not in RECIPES:
        raise ValueError(f"demo: '{data}' is not one of {', '.join(RECIPES)}.")
    if folder.exists() and any(folder.iterdir()):
        if not overwrite:
            raise ValueError(
                f"{folder}: already exists. Pass --overwrite (make demo OVERWRITE=1) to run anew, or --out elsewhere."
            )
        if not (folder / MARK).exists():
            raise ValueError(f"{folder}: not the folder of a demo (no {MARK}), so --overwrite leaves it alone.")
        if going := [name for name in TASKS if is_locked(folder / name / LOCK)]:
            raise ValueError(
                f"{folder / going[0]}: a run of an earlier demo still works there. Wait for it or end it (pkill -f "
                "'sslvit pretrain'), or pass --out elsewhere."
            )
        for name in FOLDERS:
            shutil.rmtree(folder / name, ignore_errors=True)
    require_packages("demo", "sslvit[timm]", "timm")  # needed by the last step
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / MARK, json.dumps({"data": data, "seed": seed}) + "\n")
    logger.info(f"1/4  packing {data} into WebDataset shards")
    shards = folder / "shards"
    source = pack_digits(shards) if data == "digits" else pack_cifar10(shards, archive, folder / "download")
    train, test = str(shards / "train"), str(shards / "test")
    given = {"data.shards": source.location, "seed": seed}
    given |= {"online.train": train, "online.val": test, "online.images": ONLINE_IMAGES}  # curves, not selection
    on_gpu = torch.cuda.is_available()
    to_run: dict[str, tuple[str, dict[str, Any]]] = {}
    for task, changed in split_changes(RECIPES[data], changes or {}).items():
        short = CIFAR10_ON_A_CPU[task] if data == "cifar10" and not on_gpu else {}
        of_run = {"out": str(folder / task), "online.every": ONLINE_EVERY[data][task]}
        to_run[task] = RECIPES[data][task], short | given | of_run | changed
    logger.info(f"2/4  pretraining: {', '.join(TASKS.values())}")
    if on_gpu or cpu_cores() == 1:
        for recipe, of_task in to_run.values():
            pretrain(load_recipe(recipe, of_task))
    else:  # the longest first
        pretrain_side_by_side({NAMES[task]: to_run[task] for task in reversed(to_run)})
    runs = {task: RunFolder(folder / task) for task in to_run}
    encoders: dict[str, Encoder] = {NAMES[task]: load_encoder(run.path) for task, run in runs.items()}
    logger.info("3/4  probing: logistic regression and nearest neighbors on frozen features")
    table = probe(encoders, ProbeSettings(train, test, labels_per_class=10, neighbors=[20], whiten=True, cache=None))
    blocks = list(range(1, encoders["iGPT"].settings.depth + 1))
    layers_file = folder / "figures" / "layers.png"
    layers = probe_layers(encoders["iGPT"], ProbeSettings(train, test, neighbors=[20], cache=None), blocks)
    plot_layers(layers, blocks, layers_file)
    scores = folder / "scores.json"
    write_atomically(scores, to_json(table.to_dict(), indent=1) + "\n")
    logger.info("4/4  exporting MAE's encoder to timm and comparing its outputs there")
    verdict = export_encoder(runs["mae"].path, folder / "export" / "timm", "timm")
    bars_file = plot_bars(
        folder / "figures" / "scores.png",
        table.rows,
        "top-1 accuracy (%)",
        "Probes of frozen features",
        intervals(table.scores),
    )
    curves = plot_progress({NAMES[task]: run for task, run in runs.items()}, folder / "figures")
    seconds = time.monotonic() - start
    title = f"sslvit demo: {data}"
    page = write_page(
        folder / "report.html", title,
        page_content(data, table, runs, bars_file, curves, layers, layers_file, verdict, seconds), "demo",
    )  # fmt: skip
    logger.info(f"\n{table}\n")
    logger.info(f"Done in {seconds / 60:.1f} minutes. Open these:")
    for path, what in [
        (page, "the page with everything on it"),
        (runs["mae"].figures / "reconstruction.png", "MAE: input, what the encoder saw, reconstruction"),
        (runs["dino"].figures / "attention.png", "DINO: where the class token looks"),
        (runs["dino"].figures / "patches.png", "DINO: its patches, alike ones in one color"),
        (runs["igpt"].figures / "generated.png", "iGPT: images from nothing"),
        (runs["igpt"].figures / "completed.png", "iGPT: upper halves, completed"),
        (scores, "the scores"), *((run.encoder, f"{NAMES[task]}'s encoder, for sslvit") for task, run in runs.items()),
        (folder / "export" / "timm", "MAE's encoder, for timm"),
    ]:  # fmt: skip
        logger.info(f"  {path!s:<40} {what}")
    return table.to_dict()


def pack_digits(folder: str | Path) -> ShardIndex:
    """Pack scikit-learn's digits: the 8 x 8 originals for pretraining, and placed on a canvas for evaluation.

    `pretrain` contains the originals, which the view places anew at every step; `train` and `test` contain one fixed
    placement of each digit. Image names are the digits' numbers, so that a digit can be found in all three.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    numbers = np.arange(len(images))
    is_test = numbers % TEST_EVERY == 0
    classes = [str(digit) for digit in range(10)]
    recipe = load_recipe("mae/digits")
    canvas = Views(recipe.data.view, recipe.encoder.image_size, recipe.encoder.interpolation, EVALUATION_SEED)
    (views,) = canvas.crop_batch(torch.from_numpy(images)[:, None], numbers, np.zeros_like(numbers))
    placed = views[:, 0].numpy()

    def write(name: str, pixels: np.ndarray, rows: np.ndarray) -> ShardIndex:
        return _packed(array_samples(pixels[rows], digits.target[rows], numbers[rows]), Path(folder, name), classes)

    write("train", placed, ~is_test)
    write("test", placed, is_test)
    return write("pretrain", images, ~is_test)


def pack_cifar10(folder: Path, archive: str | None, download: Path) -> ShardIndex:
    """Pack CIFAR-10, downloaded by torchvision or from a local archive.

    For a tar file of class folders, a tenth of each class becomes the test set.
    """
    if archive is not None and not Path(archive).is_file():
        raise ValueError(f"{archive}: no such file. Give cifar-10-python.tar.gz or a tar of class folders.")
    if archive is None or _is_python_archive(Path(archive)):
        from torchvision.datasets import CIFAR10

        download.mkdir(parents=True, exist_ok=True)
        if archive is not None:
            shutil.copy(archive, download / CIFAR10.filename)  # torchvision checks its MD5 before it reads it
        try:
            splits = {name: CIFAR10(str(download), train=name == "train", download=True) for name in ("train", "test")}
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"CIFAR-10 could not be downloaded ({error}). Give a local archive: --archive FILE "
                "(make demo DATA=cifar10 ARCHIVE=FILE)."
            ) from error
        indices = {
            name: _packed(array_samples(split.data, split.targets), folder / name, split.classes)
            for name, split in splits.items()
        }
        return indices["train"]
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(download, filter="data")
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(f"{archive}: damaged ({error}). Is the download complete?") from error
    root = download
    while len(inside := [entry for entry in root.iterdir() if not entry.name.startswith(".")]) == 1:
        root = inside[0]  # archives wrap their class folders in a folder or two
    found = folder_source(root)
    if found.classes is None:
        raise ValueError(f"{archive}: holds no class folders.")
    train, test = hold_out(found.samples, 0.1)
    _packed(test, folder / "test", found.classes)
    return _packed(train, folder / "train", found.classes)


def _packed(samples: Samples, folder: Path, classes: list[str]) -> ShardIndex:
    """Pack samples into a folder."""
    index = pack(samples, folder, classes)
    assert index is not None  # None only when several machines pack together
    return index


def _is_python_archive(path: Path) -> bool:
    try:
        with tarfile.open(path) as tar:
            first = tar.next()
            return first is not None and first.name.startswith("cifar-10-batches-py")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{path}: not a readable tar archive ({error}).") from error


def plot_progress(runs: dict[str, RunFolder], folder: Path) -> dict[str, Path]:
    """Plot the scores during training, one figure per kind of score."""
    drawn = {}
    for key, what in (("probe/linear", "Linear probe"), ("probe/knn", "kNN, k = 20")):
        lines = {}
        for name, run in runs.items():
            found = [(line["step"], line[key]) for line in run.read_metrics() if key in line]
            steps = run.read_metrics()[-1]["step"]
            if found:
                lines[name] = [100 * step / steps for step, _ in found], [score for _, score in found]
        if lines:
            file = folder / f"{key.replace('/', '_')}.png"
            drawn[what] = plot_curves(file, lines, "part of the run (%)", "top-1 accuracy (%)", what)
    return drawn


def page_content(
    data: str, scores: ProbeTable, runs: dict[str, RunFolder], bars_file: Path, curves: dict[str, Path],
    layers: LayerTable, layers_file: Path, verdict: dict[str, Any], seconds: float,
) -> list[str]:  # fmt: skip
    """The parts of the demo's page, top to bottom."""
    about = {
        "digits": (
            "scikit-learn's 1,797 handwritten digits (8 x 8 pixels), split once: every fifth digit is for the test, "
            "and no digit is in both parts. A view is the digit at a random size (8 to 12 pixels) and position on a "
            "black 14 x 14 canvas; DINO also gets small canvases with a part of it. Pretraining places each digit anew "
            "in every epoch and uses no labels; for evaluation every digit was placed once, with a fixed seed."
        ),
        "cifar10": (
            "CIFAR-10 at 32 x 32. Pretraining sees random crops and mirror images and uses no labels; evaluation sees "
            "the whole image."
        ),
    }[data]
    features = "; ".join(f"{name}: {scores.about['probed'][name]['features']}" for name in NAMES.values())
    units = ""
    mae = load_recipe(RECIPES[data]["mae"]).task
    assert isinstance(mae, MAESettings)
    if mae.target == "normalized":
        units = ", each predicted patch with the true one's mean and contrast: it is predicted in those units"
    health = json.loads(runs["dino"].health.read_text())
    nats = runs["igpt"].read_metrics()[-1]["train/loss"]
    by_layer = {number: layers.rows[f"layer {number}"][LINEAR] for number in (layers.best, layers.last)}
    return [
        text(about),
        heading("Probes of the features"),
        table(scores.scores),
        text(
            "Top-1 accuracy (%). Raw pixels and the same networks with untrained weights get the same probes. "
            f"Features: {features}. "
            "Linear: logistic regression on standardized features, its L2 penalty selected on held-out training "
            "images; with 10 labels per class the mean of 5 draws and half its 95 % interval. kNN: whitened features "
            f"(raw pixels, too), cosine, weighted by exp(similarity / {scores.about['temperature']})."
        ),
        picture(bars_file, "The same scores as bars."),
        heading("While they learned"),
        *(
            picture(file, f"{what} on up to {ONLINE_IMAGES:,} test images during pretraining; nothing is chosen by it.")
            for what, file in curves.items()
        ),
        heading("What MAE learned"),
        picture(
            runs["mae"].figures / "reconstruction.png",
            "Input, what the encoder sees (hidden patches gray), and the reconstruction" + units,
        ),
        picture(runs["mae"].figures / "loss.png", "Training loss."),
        heading("What DINO learned"),
        picture(
            runs["dino"].figures / "attention.png",
            "Attention of the class token to each patch in the last block, head by head; below, the patches that hold "
            "60 % of the heads' mean. No label says what belongs to the object.",
        ),
        picture(runs["dino"].figures / "attention_larger.png", "The same at twice the training resolution."),
        picture(
            runs["dino"].figures / "patches.png",
            "The first three principal components of the patches' features as red, green and blue, over all images.",
        ),
        picture(
            runs["dino"].figures / "loss.png",
            f"Training loss. It says little by itself: a collapsed run has a low one too. This run's health: "
            f"{health['verdict']}.",
        ),
        heading("What iGPT learned"),
        picture(runs["igpt"].figures / "generated.png", "Sampled unconditionally, pixel by pixel, row by row."),
        picture(
            runs["igpt"].figures / "completed.png",
            "Given the upper half (the rest is gray here), it samples the lower one, twice; below, the original.",
        ),
        picture(
            runs["igpt"].figures / "loss.png",
            f"Training loss in nats per pixel; at the end {nats:.2f} nats, {nats / math.log(2):.2f} bits.",
        ),
        picture(
            layers_file,
            f"The linear probe at each depth. Block {layers.best} is the best on {HELD_OUT}: it has "
            f"{by_layer[layers.best]:.1f} % on the test images, the last block {by_layer[layers.last]:.1f} %.",
        ),
        text(
            f"The exported timm model agrees with MAE's encoder to {verdict['largest_difference']:.1e}. "
            f"Everything on this page took {seconds / 60:.1f} minutes."
        ),
    ]
