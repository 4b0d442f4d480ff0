"""Throughput of data loading compared with common alternatives, for the tables in docs/data.md.

    python tools/benchmarks/loading.py decode PHOTOS     JPEG decoders
    python tools/benchmarks/loading.py views PHOTOS      MAE's and DINO's views against ImageFolder + PIL + torchvision
    python tools/benchmarks/loading.py small IMAGES      small images: first and later epochs, against webdataset
    python tools/benchmarks/loading.py index             start and resume at 1,000,000,000 samples on 4,096 ranks

PHOTOS and IMAGES are image folders. Contestants take turns in one process on one core (`small`: on all cores), and the
best round of each counts.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

from sslvit.data.decode import Scratch, decode_pixels
from sslvit.data.index import Shard, ShardIndex, load_index
from sslvit.data.loader import TrainingBatches
from sslvit.data.pack import pack_source
from sslvit.data.plan import EpochPlan
from sslvit.data.reader import ShardReader
from sslvit.data.records import RECORD
from sslvit.data.resample import normalize
from sslvit.data.schema import FORMAT, INDEX_FIELDS
from sslvit.data.store import PackSettings
from sslvit.data.views import Views
from sslvit.settings.views import CropSettings, MultiCropSettings

ROUNDS = 5
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def race(contestants: dict[str, Callable[[], int]], unit: str, rounds: int = ROUNDS) -> dict[str, float]:
    """Images per second of each contestant, which take turns; the best round counts."""
    best = dict.fromkeys(contestants, 0.0)
    for _ in range(rounds):
        for name, run in contestants.items():
            start = time.perf_counter()
            count = run()
            best[name] = max(best[name], count / (time.perf_counter() - start))
    first = next(iter(best.values()))
    for name, rate in best.items():
        print(f"{name:<58} {rate:>10,.0f} {unit}  {rate / first:6.2f} x", flush=True)
    return best


def bench_decode(folder: Path) -> None:
    torch.set_num_threads(1)
    contents = [path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()]
    print(f"{len(contents)} files, {np.mean([len(c) for c in contents]) / 1000:.0f} kB on average")

    def pil(content: bytes) -> np.ndarray:
        import io

        return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))

    decoders: dict[str, Callable[[bytes], object]] = {"PIL": pil}
    try:
        import cv2

        cv2.setNumThreads(1)
        decoders["opencv"] = lambda content: cv2.imdecode(np.frombuffer(content, np.uint8), 1)
    except ImportError:
        pass
    warnings.simplefilter("ignore")
    from torchvision.io import ImageReadMode, decode_jpeg

    decoders["torchvision.io"] = lambda content: decode_jpeg(
        torch.frombuffer(bytearray(content), dtype=torch.uint8), mode=ImageReadMode.RGB
    )
    scratch = Scratch()
    decoders["sslvit (simplejpeg)"] = lambda content: decode_pixels(content, scratch=scratch)
    decoders["sslvit, half scale"] = lambda content: decode_pixels(content, reduction=2, scratch=scratch)

    def all_of(decoder: Callable) -> Callable[[], int]:
        return lambda: len([decoder(content) for content in contents])

    race({name: all_of(decoder) for name, decoder in decoders.items()}, "images/s")


def dino_reference() -> Callable[[Image.Image], list[torch.Tensor]]:
    """DINO's views by torchvision transforms of one decoded PIL image, with the recipe's probabilities."""
    jitter = T.Compose([
        T.RandomHorizontalFlip(), T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8), T.RandomGrayscale(0.2),
    ])  # fmt: skip
    to_tensor = T.Compose([T.ToTensor(), T.Normalize(MEAN, STD)])

    sigmas = np.random.default_rng(0)

    def blur(image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(sigmas.uniform(0.1, 2.0)))

    def view(size: int, scale: tuple[float, float], p_blur: float, p_solarize: float) -> T.Compose:
        crop = T.RandomResizedCrop(size, scale, interpolation=T.InterpolationMode.BICUBIC)
        changes = [T.RandomApply([T.Lambda(blur)], p_blur), T.RandomApply([T.Lambda(ImageOps.solarize)], p_solarize)]
        return T.Compose([crop, jitter, *changes, to_tensor])

    views = [view(224, (0.25, 1), 1.0, 0.0), view(224, (0.25, 1), 0.1, 0.2)] + [view(96, (0.05, 0.25), 0.5, 0.0)] * 8
    return lambda image: [one(image) for one in views]


def bench_views(folder: Path) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        root = folder if any(entry.is_dir() for entry in folder.iterdir()) else folder.parent
        (index,) = pack_source(folder, Path(scratch) / "shards")
        reader, everyone = ShardReader(index), np.arange(len(index))
        plan = EpochPlan(index.shard_samples, 24)
        print(f"{len(index)} photographs; one core")

        crop = T.RandomResizedCrop(224, (0.2, 1), interpolation=T.InterpolationMode.BICUBIC)
        mae = ImageFolder(str(root), T.Compose([crop, T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(MEAN, STD)]))
        dino = ImageFolder(str(root), dino_reference())

        def torchvision(dataset: ImageFolder) -> Callable[[], int]:
            loader = torch.utils.data.DataLoader(dataset, batch_size=24)
            return lambda: sum(len(labels) for _, labels in loader)

        def ours(settings: object, color_here: bool = True) -> Callable[[], int]:
            views = Views(settings, [224, 224], "bicubic", 0, color_here)
            batches = TrainingBatches(reader, views, plan, 0, 24, 1)
            epoch = iter(range(10**6))

            def run() -> int:
                start = next(epoch) * plan.steps_per_epoch
                return sum(len(batches[start + i]) for i in range(plan.steps_per_epoch))

            return run

        def order_only() -> int:
            for step in range(plan.steps_per_epoch):
                samples, epochs = plan.batch(step)
                Views(CropSettings(), [224, 224], "bicubic").sample_boxes(np.full((24, 2), 400), samples, epochs)
            return plan.steps_per_epoch * 24

        def decode_only() -> int:
            return len([decode_pixels(reader.read(int(s)), scratch=reader.scratch) for s in everyone])

        print("\nMAE's view: random resized crop to 224, flip")
        race({"ImageFolder + PIL + torchvision": torchvision(mae), "sslvit": ours(CropSettings())}, "images/s")
        print("\nDINO's views: 2 x 224 + 8 x 96, colors, blur, solarization")
        contestants = {
            "ImageFolder + PIL + torchvision, one decode": torchvision(dino),
            "sslvit, all on the CPU": ours(MultiCropSettings()),
            "sslvit, in the workers with colors on the device": ours(MultiCropSettings(), color_here=False),
        }
        race(contestants, "images/s")
        print("\nOrder and bookkeeping")
        rates = race({"read and decode": decode_only, "order and boxes": order_only}, "images/s")
        share = rates["read and decode"] / rates["order and boxes"]
        print(f"order and boxes take {share:.2%} of the time that reading and decoding does")


def bench_small(folder: Path) -> None:
    import webdataset

    batch = 1024
    with tempfile.TemporaryDirectory() as scratch:
        # shards small enough that every webdataset worker gets its own
        (index,) = pack_source(folder, Path(scratch) / "shards", PackSettings(shard_mb=16))
        side = index.image_size[0]
        print(f"{len(index)} images of {side} x {side}; {torch.get_num_threads()} threads")
        plan = EpochPlan(index.shard_samples, batch)
        views = Views(CropSettings(), [side, side], "bicubic")

        def epoch_of(reader: ShardReader, number: int) -> int:
            batches = TrainingBatches(reader, views, plan, 0, batch, 1)
            first = number * plan.steps_per_epoch
            return sum(len(normalize(batches[first + i].views[0], MEAN, STD)) for i in range(plan.steps_per_epoch))

        def first_epoch() -> int:
            return epoch_of(ShardReader(index), 0)

        transform = T.Compose([
            T.RandomResizedCrop(side, (0.2, 1), interpolation=T.InterpolationMode.BICUBIC), T.RandomHorizontalFlip(),
            T.ToTensor(), T.Normalize(MEAN, STD),
        ])  # fmt: skip
        urls = [str(index.shard_path(number)) for number in range(len(index.shards))]
        kind = Path(index.key(0)).suffix[1:]

        def by_webdataset() -> int:
            pipeline = (
                webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).shuffle(2000).decode("pil")
                .to_tuple(kind, "cls" if index.classes else kind).map_tuple(transform, int).batched(batch)
            )  # fmt: skip
            workers = max(1, min(torch.get_num_threads(), len(urls)))
            return sum(
                len(labels) for _, labels in webdataset.WebLoader(pipeline, batch_size=None, num_workers=workers)
            )

        print("\nthe first epoch, decoding included")
        race({"webdataset": by_webdataset, "sslvit": first_epoch}, "images/s", rounds=3)
        reader = ShardReader(index)
        numbers = iter(range(1, 1000))
        print("\nfrom the second epoch on")
        race({"sslvit": lambda: epoch_of(reader, next(numbers))}, "images/s", rounds=10)


def bench_index() -> None:
    shards, each, ranks, workers = 100_000, 10_000, 4096, 8
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        np.lib.format.open_memmap(folder / "index.npy", "w+", RECORD, (shards * each,))  # a sparse file
        all_shards = [Shard(f"shard-{i:06d}.tar", each, 1 << 28, "0" * 64) for i in range(shards)]
        index = ShardIndex(folder, all_shards, np.empty(0, RECORD), mean=[0.0] * 3, std=[1.0] * 3)
        _write_index(folder, index)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        index = load_index(folder)
        loaded = time.perf_counter()
        plan = EpochPlan(index.shard_samples, ranks * 16, seed=1)
        for what, step in [("start", 0), ("resume deep in the third epoch", 2 * plan.steps_per_epoch + 9_999)]:
            began = time.perf_counter()
            samples, _ = EpochPlan(index.shard_samples, ranks * 16, seed=1).batch(step, 16, 32)
            [index.locate(int(sample)) for sample in samples]
            print(f"{what}: first batch of one rank's worker after {time.perf_counter() - began:.2f} s", flush=True)
        whole, _ = plan.batch(step)
        assert len(np.unique(whole)) == len(whole)
        began = time.perf_counter()
        rng = np.random.default_rng(0)
        for rank in rng.integers(0, ranks, 200):
            for worker in range(workers):
                rows, _ = plan.batch(step + worker, 16 * rank, 16 * rank + 16)
                assert worker or np.array_equal(rows, whole[16 * rank : 16 * rank + 16])
        seconds = (time.perf_counter() - began) / 200 / workers
        memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 2**20
        print(f"index of {shards:,} shards loaded in {loaded - start:.2f} s; {seconds * 1e3:.2f} ms per later batch")
        print(f"memory of the process {memory:.2f} GiB ({before / 2**20:.2f} before, mostly torch)")


def _write_index(folder: Path, index: ShardIndex) -> None:
    names = ("name", "samples", "bytes", "sha256")
    columns = [[getattr(shard, name) for shard in index.shards] for name in names]
    split = dict(zip(("filenames", "shard_lengths", "bytes", "sha256"), columns, strict=True))
    split |= {"name": "train", "num_samples": sum(split["shard_lengths"])}
    about = {"format": FORMAT, "records_sha256": "0" * 64, "splits": {"train": split}}
    about |= {name: getattr(index, name) for name in INDEX_FIELDS}
    (folder / "index.json").write_text(json.dumps(about))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["decode", "views", "small", "index"])
    parser.add_argument("folder", nargs="?", type=Path, help="of images")
    options = parser.parse_args()
    if options.what == "index":
        bench_index()
    elif options.folder is None or not options.folder.is_dir():
        parser.error(f"{options.what} needs a folder of images")
    else:
        {"decode": bench_decode, "views": bench_views, "small": bench_small}[options.what](options.folder)


if __name__ == "__main__":
    main()
