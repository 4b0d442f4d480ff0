"""Run a job on many numbered pieces of work in parallel processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from sslvit.environment import cpu_cores
from sslvit.progress import track_counter
from sslvit.stopping import Preempted

PARENT_CHECK_SECONDS = 0.5  # between checks that a worker's parent still runs
SIGNAL_CHECK_SECONDS = 1.0  # a signal that arrives just as a wait begins is handled only when the wait ends
Result = TypeVar("Result")
Tick = Callable[[int], None]  # reports the number of units completed since the last call
_state: tuple[Callable[[int, Tick], Any], Any] | None = None  # in a worker process: the job and the shared counter


def in_parallel(
    job: Callable[[int, Tick], Result], jobs: int | list[int], workers: int | None, what: str, total: int,
    unit: str = "images",
) -> Iterator[Result]:  # fmt: skip
    """Run job(number, tick) for every number in parallel, with a progress display; yields the results in order.

    `jobs` is the number of jobs, or a list of their numbers. tick(n) reports that n more units of the total are done.
    If `workers` is None, there is one process per core.
    """
    numbers = list(range(jobs)) if isinstance(jobs, int) else jobs
    workers = min(workers or cpu_cores(), len(numbers))
    if workers <= 1:
        with track_counter(what, total, unit) as counter:
            for number in numbers:
                yield job(number, counter.tick)
        return
    context = multiprocessing.get_context("fork")
    done = context.Value("q", 0)
    others = multiprocessing.active_children()
    with ProcessPoolExecutor(workers, context, _start, (job, done)) as pool:
        try:
            with track_counter(what, total, unit, lambda: done.get_obj().value):
                futures = deque(pool.submit(_run, number) for number in numbers)
                while futures:
                    wait_for_one({futures[0]})
                    yield futures.popleft().result()
        except BrokenProcessPool as error:
            raise RuntimeError(f"{what}: a process was killed, perhaps for its memory. Use fewer --workers.") from error
        except (KeyboardInterrupt, Preempted, GeneratorExit):  # do not wait for unfinished work
            for process in set(multiprocessing.active_children()).difference(others):
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def wait_for_one(futures: set[Future[Result]]) -> tuple[set[Future[Result]], set[Future[Result]]]:
    """Wait until at least one future is done, handling signals meanwhile; returns those done and the others."""
    while not (done := wait(futures, SIGNAL_CHECK_SECONDS, FIRST_COMPLETED).done):
        pass
    return done, futures - done


def _start(job: Callable[[int, Tick], Any], done: Any) -> None:
    global _state
    import torch

    for number in (signal.SIGTERM, signal.SIGUSR1):  # the parent's handlers are not meant for workers
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C also reaches the workers; the parent stops them
    threading.Thread(target=_exit_with, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)
    _state = job, done


def _exit_with(parent: int) -> None:
    """Exit when the parent has exited; otherwise the workers of a killed parent would wait forever."""
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_SECONDS)
    os._exit(1)


def _run(number: int) -> Any:
    assert _state is not None  # set by _start
    job, done = _state

    def tick(units: int) -> None:
        with done.get_lock():
            done.value += units

    return job(number, tick)
