"""Training steps on a CPU compared with peers that pip can install: lightly (with timm's encoders) and transformers.

    python -m venv peers && peers/bin/pip install torch torchvision timm lightly transformers
    python tools/benchmarks/steps.py --peers peers/bin/python
    python tools/benchmarks/steps.py --peers peers/bin/python --cases igpt --precision bf16 --rounds 3

Every measurement is its own process (contestants.py), and contestants alternate: each round measures each of them once,
and the rate of a 4096 x 4096 product. Results are medians over rounds, with the smallest and largest in brackets. The
case `overhead` compares `sslvit.pretrain` (Lightning, log, schedules, guard, teacher's average) with a bare loop.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from contestants import CASES, MORE_PARAMETERS
from PIL import Image

HERE = Path(__file__).parent
GIB = 2**30
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # CPU instruction sets that matter for speed


def measure(options: argparse.Namespace, python: str = sys.executable, **request: Any) -> dict[str, Any]:
    """Run contestants.py in a process, and return its measurements."""
    env = os.environ | {"OMP_NUM_THREADS": str(options.threads), "PYTHONPATH": str(HERE.parents[1])}
    command = [python, str(HERE / "contestants.py"), json.dumps(request | {"cpu_time": options.cpu_time})]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        reason = [f"exit code {done.returncode}", *done.stderr.strip().splitlines()][-1]
        raise SystemExit(f"{request}: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


def spread(values: list[float], form: str = ".2f") -> str:
    """Format the median with the smallest and largest value."""
    return f"{statistics.median(values):{form}} [{min(values):{form}}, {max(values):{form}}]"


def check_parity(case: str, who: str, ours: dict[str, int], theirs: dict[str, int]) -> str:
    """Raise if a peer's number of trained parameters differs from ours by more than is declared; returns a summary."""
    more = MORE_PARAMETERS.get((case, who), {"encoder": 0, "rest": 0})
    for part in ours:
        if theirs[part] != ours[part] + more[part]:
            raise SystemExit(f"{case}: {part} of {who} has {theirs[part]:,} parameters, ours {ours[part]:,}")
    stated = "".join(f", {who}'s {part} {number:,} more" for part, number in more.items() if number)
    return f"trained parameters: encoder {ours['encoder']:,}, rest {ours['rest']:,}{stated}"


def race(case: str, precision: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure a case, and return a row of the table for ours and for each peer."""
    work, peers = CASES[case], CASES[case].peers
    flops = measure(options, who="flops", case=case)["flops"]
    found: dict[str, list[dict[str, Any]]] = {who: [] for who in ("ours", *peers, "rate")}
    for _ in range(options.rounds):
        for who, results in found.items():
            request = {} if who == "rate" else {"case": case, "steps": options.steps}
            python = options.peers if who in peers else sys.executable
            results.append(measure(options, python, who=who, precision=precision, **request))
            if who in peers and len(results) == 1:
                print("  " + check_parity(case, who, found["ours"][0]["parameters"], results[0]["parameters"]))
    ours, rates = found["ours"], [result["rate"] for result in found["rate"]]
    print(f"\n{work.about}, batch {work.batch}, {precision}; product {spread([r / 1e9 for r in rates], '.0f')} GFLOP/s")
    rows = []
    for who in ("ours", *peers):
        results = found[who]
        seconds = [result["seconds"] for result in results]
        ratios = [theirs / result["seconds"] for theirs, result in zip(seconds, ours, strict=True)]
        shares = [flops / took / rate for took, rate in zip(seconds, rates, strict=True)]
        peak, training = (statistics.median(r[key] for r in results) / GIB for key in ("peak", "peak_of_training"))
        rows.append({
            "case": case, "precision": precision, "who": who, "images_per_second": [work.batch / s for s in seconds],
            "ours_to_it": ratios, "share_of_product_rate": shares, "peak_gib": peak, "peak_of_training_gib": training,
        })  # fmt: skip
        print(
            f"  {who:<13} {spread([work.batch / s for s in seconds]):>21} images/s   ours / it {spread(ratios)}   "
            f"share of product rate {spread(shares, '.0%')}   peak {peak:.2f} GiB, without libraries {training:.2f}",
            flush=True,
        )
    return rows


def overhead(precision: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the overhead of a run over the bare training step of ViT-Ti/16."""
    with tempfile.TemporaryDirectory() as scratch:
        photos = Path(scratch) / "photos"
        photos.mkdir()
        noise = np.random.default_rng(0).integers(0, 256, (64, 240, 240, 3), np.uint8)
        for number, pixels in enumerate(noise):
            Image.fromarray(pixels).save(photos / f"{number}.png")
        took: dict[str, list[float]] = {"bare": [], "pretrain": []}
        for _ in range(options.rounds):
            for who, seconds in took.items():
                given = {"data": str(photos), "out": f"{scratch}/run"} if who == "pretrain" else {}
                seconds.append(measure(options, who=who, precision=precision, **given)["seconds"])
    more = [run / bare - 1 for run, bare in zip(took["pretrain"], took["bare"], strict=True)]
    print(
        f"\nDINO, ViT-Ti/16, 2 x 224 + 6 x 96, batch 8, {precision}: sslvit.pretrain takes {spread(more, '.1%')} more "
        f"than a bare loop ({spread(took['pretrain'])} s, {spread(took['bare'])} s a step)",
        flush=True,
    )
    return {"case": "overhead", "precision": precision, "more": more, **took}


def machine(options: argparse.Namespace) -> str:
    """Processor, threads and versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    flags = [flag for flag in FLAGS if flag in facts.get("flags", "").split()]
    names = ("torch", "pytorch_lightning", "lightly", "timm", "transformers")
    program = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"
    threads = "1 thread" if options.threads == 1 else f"{options.threads} threads"
    threads += " (processor time)" if options.cpu_time else ""
    listed = [subprocess.run([options.peers, "-c", program, name], capture_output=True, text=True) for name in names]
    return (
        f"{facts.get('model name', platform.machine())}, family {facts.get('cpu family')} model {facts.get('model')}, "
        f"{os.cpu_count()} cores ({', '.join(flags)}), {threads}; Python {platform.python_version()}, "
        + ", ".join(f"{name} {done.stdout.strip() or '-'}" for name, done in zip(names, listed, strict=True))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default=sys.executable, help="Python that has the peers; default: this one.")
    parser.add_argument("--cases", nargs="+", choices=[*CASES, "overhead"], default=[*CASES, "overhead"])
    parser.add_argument("--precision", nargs="+", choices=["float32", "bf16"], default=["float32", "bf16"])
    parser.add_argument("--rounds", type=int, default=5, help="Processes of each contestant.")
    parser.add_argument("--steps", type=int, default=3, help="Steps timed in each process.")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--cpu-time", action="store_true", help="Time of the processor: for one thread on a busy machine."
    )
    parser.add_argument("--out", type=Path, help="JSON file of all numbers.")
    options = parser.parse_args()
    if options.cpu_time and options.threads > 1:
        parser.error("--cpu-time counts what threads wait for each other; give --threads 1")
    print(machine(options), flush=True)
    rows = []
    for case in options.cases:
        for precision in options.precision:
            rows += [overhead(precision, options)] if case == "overhead" else race(case, precision, options)
    if options.out is not None:
        options.out.write_text(json.dumps({"machine": machine(options), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
