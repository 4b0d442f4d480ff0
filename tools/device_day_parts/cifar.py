"""CIFAR-10 with three recipes: a run that fits into the time, then probes of its encoder and of an untrained one."""

from __future__ import annotations

import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

from device_day_parts.common import Day, in_a_run, recipe, synchronize

RECIPES = ("mae/vit_tiny_cifar10", "dino/vit_tiny_cifar10", "igpt/small_cifar10")
PROBING = 0.25  # fraction of a recipe's time reserved for figures and probes
CALIBRATION = 3.0  # seconds of steps from which the number of steps is estimated
WARMUP = 5  # steps


def run_part(day: Day) -> None:
    if day.item:
        run_recipe(day, day.item)
        return
    failed = []
    processes = {name: day.start(name) for name in RECIPES}  # they import in parallel, then take turns
    for number, (name, process) in enumerate(processes.items()):
        day.wait_for(ready(day, name), until=time.time() + day.seconds_left / 2)
        ends, go = time.time() + day.seconds_left / (len(RECIPES) - number), turn_of(day, name)
        go.with_suffix(".part").write_text(str(ends))
        go.with_suffix(".part").rename(go)
        try:
            process.wait(max(1, ends - time.time()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.returncode:
            failed.append(name)
            day.record(recipe=name, error="stopped: its time was over" if process.returncode < 0 else "see the output")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def run_recipe(day: Day, name: str) -> None:
    import sslvit.evaluate.probe
    import sslvit.train.run

    if not day.wait_for(day.work / "cifar.ready"):
        raise SystemExit("cifar: not packed in time")
    ready(day, name).touch()
    if not day.wait_for(turn_of(day, name)):
        raise SystemExit("its turn never came")
    ends = float(turn_of(day, name).read_text())
    begun, origin = time.time(), (day.work / "cifar.ready").read_text()
    train, test = day.work / "cifar" / "train", day.work / "cifar" / "test"
    # null: a warm-up for a run of this length instead of the recipe's
    changes: dict[str, Any] = {"optim.warmup_epochs": None, "data.workers": day.pick(8, 0)}
    whole = recipe(day, name, train, "calibration", **changes, **{"train.steps": 10**6})
    rate = in_a_run(whole, lambda fit, trainer, task, data: steps_per_second(day, fit, trainer, task, data))
    reserve = PROBING * (ends - begun)
    steps = day.pick(max(20, round(rate * (ends - time.time() - reserve))), 8)
    out = f"cifar-{name.replace('/', '-')}"
    settings = recipe(
        day, name, train, out, **changes, **{"train.steps": steps, "train.log_every": max(1, steps // 50)}
    )
    folder = sslvit.train.run.pretrain(settings)
    lines = folder.read_metrics()
    batch = folder.read_config()["data"]["global_batch_size"]
    parts = ("data", "forward", "backward", "optimizer")
    day.record(
        recipe=name, origin=origin, steps=steps, epochs=lines[-1]["epoch"], seconds=lines[-1]["time/elapsed"],
        images_per_second=statistics.median(line["time/images_per_second"] for line in lines), batch=batch,
        first_loss=lines[0]["train/loss"], loss=lines[-1]["train/loss"],
        split_seconds={part: statistics.median(line.get(f"time/{part}", 0) for line in lines) for part in parts},
    )  # fmt: skip
    probe(day, name, folder.path, train, test)


def ready(day: Day, name: str) -> Path:
    """File that appears when a recipe's process has finished its imports."""
    return day.work / f"ready-{name.replace('/', '-')}"


def turn_of(day: Day, name: str) -> Path:
    """File that appears when a recipe may start; it contains the Unix time until which the recipe may run."""
    return day.work / f"turn-{name.replace('/', '-')}"


def steps_per_second(day: Day, fit: Any, trainer: Any, task: Any, data: Any) -> float:
    """Speed of the run's own steps on its own data, without the first ones."""
    import pytorch_lightning as pl

    class Enough(Exception):
        pass

    class Pace(pl.Callback):
        steps, rate = 0, 0.0

        def on_train_batch_end(self, *_: Any) -> None:
            self.steps += 1
            if self.steps == WARMUP:
                synchronize(day)
                self.start = time.perf_counter()
            elif self.steps > WARMUP and time.perf_counter() - self.start > day.pick(CALIBRATION, 0.1):
                synchronize(day)
                self.rate = (self.steps - WARMUP) / (time.perf_counter() - self.start)
                raise Enough

    pace = Pace()
    trainer.callbacks.append(pace)
    try:
        fit(trainer, task, datamodule=data)
    except Enough:
        return pace.rate
    raise RuntimeError("training ended before its pace was known.")


def probe(day: Day, name: str, run: Path, train: Path, test: Path) -> None:
    """Probe by nearest neighbors first, which takes seconds, then by logistic regression."""
    from sslvit.checkpoint import load_encoder
    from sslvit.evaluate.probe import probe as probe_encoders
    from sslvit.evaluate.probe import untrained
    from sslvit.settings import ProbeSettings

    encoder = load_encoder(run)
    encoders = {"trained": encoder, "untrained": untrained(encoder, 0)}
    shared: dict[str, Any] = {"baselines": False, "cache": str(day.work / "features"), "batch": day.pick(512, 32)}
    for kind in ({"protocol": None, "neighbors": [20]}, {"neighbors": []}):
        table = probe_encoders(encoders, ProbeSettings(str(train), str(test), **shared, **kind))
        day.record(recipe=name, probe=table.rows, images=table.about["val_images"])
