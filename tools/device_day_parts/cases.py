"""Training steps of six recipes as in `sslvit pretrain`, eager and compiled: speed, memory, time by part, host waits.

Each case is a process. All of them prepare and compile at the same time, since that uses the CPU and not the device.
Only one process at a time has the turn to run timed steps.
"""

from __future__ import annotations

import gc
import time
import traceback
from dataclasses import replace
from typing import Any

import torch
from filelock import FileLock

from device_day_parts.common import Day, in_a_run, last_line, pack_noise, recipe
from device_day_parts.watch import LOG_EVERY, Finished, Watch

# recipe -> images per micro-batch, which fit in 80 GB
CASES = {
    "mae/vit_large_in1k": 256, "dino/vit_small_in1k_100": 128, "igpt/medium_in1k": 16,
    "mae/vit_tiny_cifar10": 1024, "dino/vit_tiny_cifar10": 512, "igpt/small_cifar10": 128,
}  # fmt: skip
ON_CPU = ["mae/vit_large_in1k", "dino/vit_tiny_cifar10", "igpt/small_cifar10"]  # tiny networks of each task are enough
MODES = {"eager": "none", "compiled": "auto", "CUDA graphs": "reduce-overhead"}  # train.compile
SMALL = ("mae/vit_tiny_cifar10", "dino/vit_tiny_cifar10", "igpt/small_cifar10")  # steps may be bound by kernel launches
SHARED_CARD = 120e9  # bytes of device memory from which all cases may compile at the same time
# barrier -> fraction of the part's time until which a process waits there for the others
UNTIL = {"built": 0.25, "eager": 0.5, "compiled": 0.75}


def run_part(day: Day) -> None:
    if day.item:
        run_case(day, day.item)
        return
    pack_noise(day.work / "noise-8", day.pick(2048, 64), 8)
    begun = time.time()
    (day.work / "begun").write_text(str(begun))
    processes = {name: day.start(name) for name in day.pick(list(CASES), ON_CPU)}
    while running := {name: process for name, process in processes.items() if process.poll() is None}:
        for name in CASES.keys() - running.keys():  # the others need not wait for a process that has ended
            for barrier in UNTIL:
                arrive(day, barrier, name)
        time.sleep(0.2)
    if failed := [name for name, process in processes.items() if process.returncode]:
        raise SystemExit(f"failed: {', '.join(failed)}")


def run_case(day: Day, name: str) -> None:
    turn = FileLock(day.work / "turn.lock")
    failed = []
    for mode in [mode for mode in MODES if mode != "CUDA graphs" or name in SMALL]:
        batch = day.pick(CASES[name], 8)
        while True:
            try:
                day.record(**measure(day, name, mode, batch, turn))
                break
            except Exception as error:
                traceback.print_exc()
                message, is_memory = last_line(error), type(error).__name__ == "OutOfMemoryError"
            finally:
                turn.release(force=True)
            if not is_memory or batch == 1:
                day.record(case=name, mode=mode, batch=batch, error=message)
                failed.append(mode)
                break
            day.record(case=name, mode=mode, batch=batch, note=f"out of memory: halved ({message[:120]})")
            batch //= 2
            free(day)
        free(day)
        if mode == "eager":
            meet(day, "eager", name)
    if failed:
        raise SystemExit(f"{name}: failed {', '.join(failed)}")


def measure(day: Day, name: str, mode: str, batch: int, turn: FileLock) -> dict[str, Any]:
    def wait_for_turn(is_warm: bool) -> None:
        """Called before the first step and before the timed ones; compiling needs no turn if the card has room."""
        if mode == "eager" and not is_warm:
            meet(day, "built", name)
        elif is_warm and not turn.is_locked:
            meet(day, "compiled", name)
        if is_warm or mode == "eager" or must_be_alone(day):
            turn.acquire()

    changes = {"data.global_batch_size": batch, "train.steps": 10**6, "train.micro_batch_size": None,
               "train.compile": MODES[mode],
               "train.log_every": LOG_EVERY, "data.workers": 0}  # fmt: skip
    settings = recipe(day, name, day.work / "noise-8", f"{name.replace('/', '-')}-{mode}", **changes)
    watch = Watch(day, wait_for_turn)

    def step(fit: Any, trainer: Any, task: Any, data: Any) -> None:
        # random numbers, because zeros take less power and run faster than real images
        one = data.examples(2)
        views = [torch.randn(batch, *view.shape[1:], device=day.device) for view in one.views]
        rows = torch.arange(batch)
        made = replace(one, views=views, labels=None, samples=rows, valid=rows >= 0, epochs=0 * rows, colors=None)
        trainer.callbacks.append(watch)
        try:
            fit(trainer, task, train_dataloaders=Repeated(made))
        except Finished:
            turn.release(force=True)

    in_a_run(settings, step)
    found = {"case": name, "mode": mode, "batch": batch, **watch.found}
    found["images_per_second"] = batch / watch.found["step_seconds"]
    if mode != "eager":
        found |= graphs()
    return found | utilization(day, settings, found["images_per_second"])


class Repeated:
    """A loader that repeats one batch endlessly; each step gets a copy of the record, but not of its tensors."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __iter__(self) -> Any:
        while True:
            yield replace(self.batch)


def must_be_alone(day: Day) -> bool:
    return not day.is_cpu and torch.cuda.get_device_properties(0).total_memory < SHARED_CARD


def free(day: Day) -> None:
    """Free the card's memory for the other processes."""
    gc.collect()
    if not day.is_cpu:
        torch._dynamo.reset()
        torch.cuda.empty_cache()


def arrive(day: Day, barrier: str, name: str) -> None:
    (day.work / f"{barrier}-{name.replace('/', '-')}").touch()


def meet(day: Day, barrier: str, name: str) -> None:
    """Wait until every case has reached the barrier, but no longer than a fraction of the part's time."""
    arrive(day, barrier, name)
    begun = float((day.work / "begun").read_text())
    files = [day.work / f"{barrier}-{other.replace('/', '-')}" for other in CASES]
    day.wait_for(*files, until=begun + UNTIL[barrier] * (day.deadline - begun))


def graphs() -> dict[str, Any]:
    """Numbers of graphs and graph breaks of torch.compile."""
    from torch._dynamo.utils import counters

    return {"graphs": counters["stats"].get("unique_graphs", 0), "graph_breaks": sum(counters["graph_break"].values())}


def utilization(day: Day, settings: Any, images_per_second: float) -> dict[str, Any]:
    """FLOPs per image, and the utilization relative to the data sheet's peak and to the measured one."""
    try:
        from sslvit.data.index import load_index
        from sslvit.train.forecast import PEAKS, mfu_per_throughput

        of_one_tflops = replace(settings, train=replace(settings.train, peak_tflops=1.0))
        flops = 1e12 * mfu_per_throughput(of_one_tflops, load_index(settings.data.shards))
    except Exception as error:  # the speed is valid without it
        return {"mfu_error": last_line(error)}
    machine = {record.get("what"): record for record in day.read("machine")}
    card = str(machine.get("versions", {}).get("card", "")).lower().replace(" ", "")
    peaks = {"mfu": next((tflops for key, tflops in PEAKS.items() if key in card), None)}
    products = [record["value"] for what, record in machine.items() if what and what.startswith("matrix product")]
    peaks["share_of_measured"] = max(products, default=None)
    work = flops * images_per_second / 1e12
    return {"gflops_per_image": flops / 1e9, "tflops": work, **{k: work / v if v else None for k, v in peaks.items()}}
