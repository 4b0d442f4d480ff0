"""The same work on many numbered pieces, in processes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from sslvit.progress import track_counter

_state: tuple[Callable, Any] | None = None  # of a worker process: the job, and the counter that it moves


def in_parallel(
    job: Callable[[int, Callable[[int], None]], Any], jobs: int | list[int], workers: int | None, what: str,
    total: int, unit: str = "images",
) -> Iterator[Any]:  # fmt: skip
    """job(number, tick) for every number, in processes, results in order; shows how far it is.

    Args:
        job: does one; calls tick(n) when n more units are done.
        jobs: how many, or which numbers.
        workers: processes; None for one per core.
        what: is being done, as in "packing".
        total: units in all.
        unit: what is counted.
    """
    numbers = list(range(jobs)) if isinstance(jobs, int) else jobs
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(workers or cores, len(numbers))
    context = multiprocessing.get_context("fork") if "fork" in multiprocessing.get_all_start_methods() else None
    if workers <= 1 or context is None:
        with track_counter(what, total, unit) as counter:
            for number in numbers:
                yield job(number, counter.tick)
        return
    done = context.Value("q", 0)
    with ProcessPoolExecutor(workers, context, _start, (job, done)) as pool:
        try:
            with track_counter(what, total, unit, lambda: done.value):
                yield from pool.map(_run, numbers)
        except BrokenProcessPool as error:
            raise RuntimeError(f"{what}: a process was killed, perhaps for its memory. Use fewer --workers.") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _start(job: Callable, done: Any) -> None:
    global _state
    import torch

    torch.set_num_threads(1)
    _state = job, done


def _run(number: int) -> Any:
    job, done = _state

    def tick(units: int) -> None:
        with done.get_lock():
            done.value += units

    return job(number, tick)
