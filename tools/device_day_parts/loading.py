"""Speed of the data loader of `sslvit pretrain`, without training."""

from __future__ import annotations

import time
from typing import Any

from device_day_parts.common import Day, in_a_run, last_line, recipe, synchronize

WORKERS = 14
# name -> data set, recipe, images per batch, other settings
VIEWS = {
    "photographs, MAE's view of 224": ("photos", "mae/vit_large_in1k", 256, {}),
    "photographs, DINO's 2 x 224 + 8 x 96": ("photos", "dino/vit_small_in1k_100", 64, {}),
    "CIFAR-10, MAE's view": ("cifar", "mae/vit_tiny_cifar10", 1024, {}),
    "CIFAR-10, MAE's view, by workers": ("cifar", "mae/vit_tiny_cifar10", 1024, {"data.cache_on_device": False}),
    "CIFAR-10, DINO's 2 x 32 + 6 x 16": ("cifar", "dino/vit_tiny_cifar10", 512, {}),
}
SECONDS = 2.0


def run_part(day: Day) -> None:
    failed = []
    for name, (data, of, batch, more) in VIEWS.items():
        if not day.wait_for(day.work / f"{data}.ready"):
            raise SystemExit(f"{data}: not packed in time")
        changes = {"data.global_batch_size": day.pick(batch, 8), "data.workers": day.pick(WORKERS, 2),
                   "train.steps": 10**6, "encoder.depth": 1, **more}  # fmt: skip
        try:
            settings = recipe(day, of, day.work / data / ("train" if data == "cifar" else ""), "loading", **changes)
            found = in_a_run(settings, lambda fit, trainer, task, data: iterate(day, trainer, data))
        except Exception as error:
            failed.append(name)
            found = {"error": last_line(error)}
        is_cached = found.get("lies_on", "cpu") != "cpu"  # the set is on the device, and no worker reads
        workers = 0 if is_cached else changes["data.workers"]
        day.record(view=name, origin=(day.work / f"{data}.ready").read_text(), workers=workers, **found)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def iterate(day: Day, trainer: Any, data: Any) -> dict[str, Any]:
    """Images per second after the first batches."""
    import torch

    data.trainer = trainer  # as Trainer.fit attaches it
    start = time.perf_counter()
    batches = iter(data.train_dataloader())
    for _ in range(day.pick(WORKERS, 1)):  # one per worker, so that each has read its index
        batch = next(batches)
    synchronize(day)
    first = time.perf_counter() - start
    images, start = 0, time.perf_counter()
    while time.perf_counter() - start < day.pick(SECONDS, 0.3):
        batch = next(batches)
        images += len(batch)
    synchronize(day)
    rate = images / (time.perf_counter() - start)
    on = batch.views[0].device
    del batches
    return {"images_per_second": rate, "start_seconds": first, "batch": len(batch), "lies_on": str(torch.device(on))}
