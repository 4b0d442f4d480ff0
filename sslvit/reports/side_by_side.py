"""Several small runs in parallel, one single-threaded process each, since they would gain little from more threads."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sslvit.data.parallel import wait_for_one
from sslvit.environment import cpu_cores
from sslvit.files import printable
from sslvit.plugins import named_modules
from sslvit.settings.sweep import format_value

logger = logging.getLogger(__name__)

WARNING = "warning: "  # prefix of warnings in a command's output
LAST_LINES = 3  # of a failed run's output, for the error
Processes = dict[str, "subprocess.Popen[str]"]


def pretrain_side_by_side(runs: dict[str, tuple[str, dict[str, Any]]]) -> None:
    """Run `sslvit pretrain` for each name, as many at once as there are cores, and print their output with the names.

    Each run has its own process, so its results do not depend on the others or on the number of cores. When this
    process is stopped, all of them write a checkpoint and end.

    Args:
        runs: Name -> recipe, and its changes by dotted key.

    Raises:
        RuntimeError: A run failed. The message has its last lines, and the other runs have been stopped.
    """
    processes, is_over = Processes(), threading.Event()
    with ThreadPoolExecutor(min(cpu_cores(), len(runs))) as pool:
        try:
            running = {pool.submit(_pretrain, processes, is_over, name, *run) for name, run in runs.items()}
            while running:
                done, running = wait_for_one(running)
                for run in done:
                    run.result()
        except BaseException:
            is_over.set()
            for process in list(processes.values()):
                process.terminate()
            raise


def _pretrain(processes: Processes, is_over: threading.Event, name: str, recipe: str, changes: dict[str, Any]) -> None:
    if is_over.is_set():
        return
    words = [f"--{key}={format_value(value)}" for key, value in (changes | {"train.requeue": False}).items()]
    if plugins := named_modules():
        words += ["--plugin", ",".join(plugins)]
    # without SLURM's variables, a run that is stopped because another failed does not requeue the job
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        [sys.executable, "-m", "sslvit", "pretrain", "--config", recipe, *words], text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment,
        start_new_session=True,  # Ctrl-C reaches only this process, which stops the others
    )  # fmt: skip
    processes[name] = process
    if is_over.is_set():  # set since the check above
        process.terminate()
    last: deque[str] = deque(maxlen=LAST_LINES)
    assert process.stdout is not None
    for line in process.stdout:
        text = line.rstrip("\n")
        last.append(text)
        if text.startswith(WARNING):
            logger.warning(f"{name}: {printable(text.removeprefix(WARNING), 1000)}")
        else:
            logger.info(f"{name}: {printable(text, 1000)}")
    if process.wait() != 0:
        raise RuntimeError(f"{name}: its run failed ({process.returncode}): {printable(' / '.join(last), 1000)}")
