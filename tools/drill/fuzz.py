"""Damaged files of every kind that is read: only documented errors come out, in one line, soon, in little memory.

A trial is a forked child that takes damaged inputs for about a second; each has its own random stream, so a failure
can be repeated alone by its number (tar-12.44). A child that dies or hangs costs one input, which is a failure.
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import random
import resource
import struct
import sys
import time
import traceback
from pathlib import Path

import damaged_data
import damaged_images
import damaged_weights
from children import Child
from material import Workshop, import_libraries
from targets import Target
from trials import Part, Trial

from sslvit.data.header import BadImage
from sslvit.files import explain_os_error

TARGETS = damaged_images.TARGETS | damaged_data.TARGETS | damaged_weights.TARGETS
BATCH_SECONDS = 0.6
MAX_BATCH = 4000
SLOW_SECONDS = 3.0  # of one processor, for one input of a few kilobytes
HANGS_SECONDS = 30.0
MEMORY = 600 << 20  # bytes that one input may take: the largest image that is read, twice
ADDRESSES = 4 << 30  # bytes beyond what a process has already: more is refused by the system
MAX_MESSAGE = 500  # characters
DOCUMENTED = (ValueError, OSError, RuntimeError)


def parts(workshop: Workshop) -> list[Part]:
    import_libraries()
    return [
        Part(name, f"damaged {target.what}: documented errors in one line, no crash, in time and memory",
             lambda trial, target=target: take_inputs(trial, workshop, target))
        for name, target in TARGETS.items()
    ]  # fmt: skip


def take_inputs(trial: Trial, workshop: Workshop, target: Target) -> None:
    """One batch; begun again behind an input that killed its process."""
    target.prepare(workshop)
    found = trial.folder / "found.jsonl"
    first, left = trial.inner or 0, MAX_BATCH if trial.inner is None else 1
    begin, trial.tried = time.monotonic(), 0
    with mmap.mmap(-1, 16) as progress:
        while left > 0 and (trial.tried == 0 or time.monotonic() < begin + BATCH_SECONDS):
            progress[:] = struct.pack("qd", first, time.monotonic())
            seconds = BATCH_SECONDS - (time.monotonic() - begin)
            numbers = range(first, first + left)
            work = lambda numbers=numbers, seconds=seconds: batch(trial, target, numbers, seconds, progress, found)  # noqa: E731
            child = Child(work, trial.folder / "log.txt", limits={resource.RLIMIT_AS: address_space() + ADDRESSES,
                                                                  resource.RLIMIT_CORE: 0})  # fmt: skip
            died = watch(child, progress)
            at, _ = struct.unpack("qd", progress[:])
            trial.tried += at - first + (1 if died else 0)
            if not died:
                break
            trial.problem(f"{died}: {child.text()[-300:]}", at)
            left, first = left - (at + 1 - first), at + 1
    for line in found.read_text().splitlines() if found.exists() else []:
        number, problem = json.loads(line)
        trial.problem(problem, number)
    strange = [path.name for path in trial.folder.iterdir() if path.name not in ("found.jsonl", "log.txt", "in")]
    trial.expect(not strange, f"written outside of its folder: {', '.join(strange)}")


def watch(child: Child, progress: mmap.mmap) -> str:
    """Wait for the end of a batch; what befell the process, or nothing."""
    while child.poll() is None:
        time.sleep(0.005)
        _, since = struct.unpack("qd", progress[:])
        if time.monotonic() > since + HANGS_SECONDS:
            child.kill_all()
            return f"still at work after {HANGS_SECONDS:g} s"
    return "" if child.code == 0 else f"the process ended with {child.code}"


def batch(
    trial: Trial, target: Target, numbers: range, seconds: float, progress: mmap.mmap, found: Path
) -> None:  # fmt: skip
    """In the child: damage, read and judge inputs, one after the other."""
    folder = trial.folder / "in" / "side"
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    reader = target.open(folder)
    reader.read(*reader.valid())  # what is not damaged can be read
    gc.collect()
    key = trial.rng.random()  # the same for every input of this batch, also when one is taken alone
    is_alone, end = trial.inner is not None, time.monotonic() + seconds
    quiet = open(os.devnull, "w")  # noqa: SIM115 until the process ends
    for number in numbers:
        progress[:] = struct.pack("qd", number, time.monotonic())
        rng = random.Random(f"{key} {number}")
        payload = reader.damaged(rng)
        before, start = peak_memory(), time.process_time()
        sys.stdout = sys.stderr if is_alone else quiet
        problem = ""
        try:
            reader.read(*payload)
        except Exception as error:
            problem = judge(error, reader.name)
            if is_alone:
                traceback.print_exc()
        taken, grown = time.process_time() - start, peak_memory() - before
        if taken > SLOW_SECONDS:
            problem = f"{problem}; took {taken:.1f} s of processor time".lstrip("; ")
        if grown > MEMORY:
            problem = f"{problem}; took {grown >> 20} MB".lstrip("; ")
        if problem:
            with found.open("a") as file:
                file.write(json.dumps([number, problem]) + "\n")
        progress[:] = struct.pack("qd", number + 1, time.monotonic())
        if grown > MEMORY or time.monotonic() > end:
            return


def judge(error: Exception, name: str | None) -> str:
    """What is wrong with an error, if it is not one that the documentation promises.

    Args:
        error: that came out.
        name: of the file, which the message must have; None where the caller knows it.
    """
    kind = type(error)
    is_ours = kind.__module__.startswith("sslvit.") and issubclass(kind, DOCUMENTED)
    is_plain = kind in (ValueError, RuntimeError) or (issubclass(kind, OSError) and kind.__module__ == "builtins")
    message = (explain_os_error(error) if isinstance(error, OSError) else None) or str(error)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError):
            return f"asked for more than {ADDRESSES >> 30} GB: {message[:200]!r}"
        cause = cause.__cause__ or cause.__context__
    if not (is_ours or is_plain):
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{kind.__name__}: {message[:200]!r} ({Path(place.filename).name}:{place.lineno})"
    if not message.strip():
        return f"{kind.__name__} without words"
    if not message.isprintable():
        return f"not one line of printable characters: {message[:300]!r}"
    if len(message) > MAX_MESSAGE:
        return f"a message of {len(message)} characters: {message[:100]!r}"
    if name is not None and not isinstance(error, BadImage) and name not in message:
        return f"the message does not name {name}: {message[:200]!r}"
    return ""


def peak_memory() -> int:
    """Most bytes that this process has held at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
