"""Two machines on one: two network namespaces joined by a cable (a veth pair), each with one process of a run.

    sudo python tools/two_hosts/two_hosts.py SHARDS OUT [--config mae/digits] [--key value ...]

trains over the cable with gloo, each host reading its own rank's slice of every batch, and returns the exit codes of
both. Failures of a network can be simulated:

    --kill STEP            kill everything on the second host once it has logged this step
    --cut STEP             disconnect the cable
    --slow STEP --rate R   limit the bandwidth to R from then on, such as 20kbit

Needs Linux, root, `ip` and `tc` (iproute2). Nothing outside of the two namespaces is touched, and both are removed at
the end, whatever happens.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ADDRESSES = ("10.77.0.1", "10.77.0.2")
CABLE = "cable"  # the name of either end
PORT = 29511


def why_not() -> str | None:
    """Why this machine cannot play two; None if it can."""
    if sys.platform != "linux":
        return "network namespaces are a feature of Linux"
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed (iproute2)"
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    try:
        with TwoHosts():
            return None
    except subprocess.CalledProcessError as error:
        return f"this machine makes no network namespaces ({(error.stderr or str(error)).strip()})"


class TwoHosts:
    """A context in which the two hosts exist."""

    def __enter__(self) -> TwoHosts:
        self.names = tuple(f"sslvit-{os.getpid()}-{end}" for end in "ab")
        self.processes: list[subprocess.Popen] = []
        try:
            for name in self.names:
                ip("netns", "add", name)
            ip("-n", self.names[0], "link", "add", CABLE, "type", "veth", "peer", "name", CABLE, "netns", self.names[1])
            for name, address in zip(self.names, ADDRESSES, strict=True):
                ip("-n", name, "address", "add", f"{address}/24", "dev", CABLE)
                for device in ("lo", CABLE):
                    ip("-n", name, "link", "set", device, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for host, name in enumerate(self.names):
            self.kill(host)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
        for process in self.processes:
            process.wait()

    def start(self, words: Sequence[str], log: Path) -> list[subprocess.Popen]:
        """`sslvit WORDS` on both hosts, as the two machines of one run; what each says goes to a file.

        Args:
            words: of the command.
            log: a folder for host-0.txt and host-1.txt.
        """
        log.mkdir(parents=True, exist_ok=True)
        self.started = time.time()
        started = []
        for host, name in enumerate(self.names):
            env = os.environ | {
                "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": str(PORT), "NODE_RANK": str(host),
                "GLOO_SOCKET_IFNAME": CABLE,  # otherwise gloo looks for the machine's name, which both share
            }  # fmt: skip
            command = ["ip", "netns", "exec", name, sys.executable, "-m", "sslvit.cli", *words,
                       "--train.nodes", "2", "--train.devices", "1", "--train.accelerator", "cpu"]  # fmt: skip
            with open(log / f"host-{host}.txt", "w") as file:
                started.append(subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT))
        self.processes += started
        return started

    def kill(self, host: int) -> None:
        """Everything on a host, at once."""
        found = subprocess.run(["ip", "netns", "pids", self.names[host]], capture_output=True, text=True).stdout
        for process in found.split():
            try:
                os.kill(int(process), signal.SIGKILL)
            except ProcessLookupError:
                continue

    def cut(self) -> None:
        """Nothing arrives any longer, and nobody is told."""
        self._tc("netem", "loss", "100%")

    def slow(self, rate: str) -> None:
        """So much gets through, such as 20kbit."""
        self._tc("tbf", "rate", rate, "burst", "2kb", "limit", "64kb")

    def _tc(self, *words: str) -> None:
        for name in self.names:
            command = ["ip", "netns", "exec", name, "tc", "qdisc", "replace", "dev", CABLE, "root", *words]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode and words[0] == "netem":  # not in every kernel
                ip("-n", name, "link", "set", CABLE, "down")
            elif done.returncode:
                raise subprocess.CalledProcessError(done.returncode, command, stderr=done.stderr)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def wait_for_step(
    run: Path, step: int, processes: Sequence[subprocess.Popen], since: float = 0.0, timeout: float = 300
) -> None:
    """Until the run has logged a step, in lines written since a time.

    Raises:
        RuntimeError: it ended before, or that took too long.
    """
    deadline, metrics = time.monotonic() + timeout, run / "metrics.jsonl"
    while not metrics.exists() or metrics.stat().st_mtime < since or last_step(metrics) < step:
        if any(process.poll() is not None for process in processes) or time.monotonic() > deadline:
            raise RuntimeError(f"{run}: ended, or stood still, before step {step}.")
        time.sleep(0.02)


def last_step(metrics: Path) -> int:
    lines = metrics.read_text().split("\n")[:-1]
    return json.loads(lines[-1])["step"] if lines else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards")
    parser.add_argument("out")
    parser.add_argument("--config", default="mae/digits")
    parser.add_argument("--kill", type=int, metavar="STEP")
    parser.add_argument("--cut", type=int, metavar="STEP")
    parser.add_argument("--slow", type=int, metavar="STEP")
    parser.add_argument("--rate", default="20kbit")
    options, rest = parser.parse_known_args()
    if reason := why_not():
        parser.exit(1, f"two_hosts: {reason}\n")
    out = Path(options.out)
    words = ["pretrain", "--config", options.config, "--data", options.shards, "--out", options.out, *rest]
    with TwoHosts() as hosts:
        log = out.with_name(f"{out.name}-hosts")
        processes = hosts.start(words, log)
        print(f"each host says what it does in {log}", flush=True)
        for step, act in (
            (options.kill, lambda: hosts.kill(1)), (options.cut, hosts.cut),
            (options.slow, lambda: hosts.slow(options.rate)),
        ):  # fmt: skip
            if step is not None:
                wait_for_step(out, step, processes, hosts.started)
                act()
        start = time.monotonic()
        for host, process in enumerate(processes):
            code = process.wait()
            said = (log / f"host-{host}.txt").read_text().strip().splitlines()
            print(f"host {host}: exit code {code} after {time.monotonic() - start:.0f} s: {said[-1] if said else ''}")
    return max(abs(process.returncode) for process in processes)


if __name__ == "__main__":
    raise SystemExit(main())
