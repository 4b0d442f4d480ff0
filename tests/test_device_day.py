"""tools/device_day.py on a machine without a GPU: its parts, its limits, its records and its table."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tools"))

import device_day  # noqa: E402
from device_day_parts import data, table  # noqa: E402
from device_day_parts.common import Day, append_record, read_records  # noqa: E402
from device_day_parts.watch import Waits  # noqa: E402


def options(out: Path, **changes) -> argparse.Namespace:
    return argparse.Namespace(**{"out": out, "data": None, "cpu": True, "seconds": 60.0, "only": None} | changes)


def script(out: Path, *words: str, timeout: float = 900) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "device_day.py"), "--out", str(out), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=os.environ)


def records(out: Path, part: str) -> list[dict]:
    return [record for record in read_records(out / "results.jsonl") if record["part"] == part]


@pytest.mark.slow
def test_every_part_runs_on_a_cpu_at_tiny_sizes(tmp_path: Path) -> None:
    done = script(tmp_path, "--cpu", "--seconds", "60")
    assert done.returncode == 0, done.stdout[-5000:]
    assert {path.name for path in tmp_path.iterdir()} == {"results.jsonl", "table.md", "output.txt"}
    assert [record["part"] for record in read_records(tmp_path / "results.jsonl") if "ended" in record] == [
        *device_day.PARTS
    ]
    tests = records(tmp_path, "gpu_tests")
    assert {record["outcome"] for record in tests if "test" in record} == {"skipped"}
    fixtures = records(tmp_path, "fixtures")
    assert {record["outcome"] for record in fixtures if "test" in record} == {"passed"}
    assert [record["is_equal"] for record in fixtures if "deterministic" in record] == [True] * 3
    largest = {record["fixture"]: record["bf16_largest"] for record in fixtures if "fixture" in record}
    assert 1e-4 < largest["mae_model"] < 0.05  # rounded, and not wrong
    steps = [record for record in records(tmp_path, "cases") if "step_seconds" in record]
    assert {(record["case"].split("/")[0], record["mode"]) for record in steps} == {
        (task, mode)
        for task, modes in {
            "mae": ("eager", "compiled"), "dino": ("eager", "compiled", "CUDA graphs"),
            "igpt": ("eager", "compiled", "CUDA graphs"),
        }.items()
        for mode in modes
    }  # fmt: skip
    for record in steps:
        assert record["images_per_second"] == pytest.approx(record["batch"] / record["step_seconds"])
        assert sum(record["split_seconds"].values()) == pytest.approx(record["step_seconds"], rel=0.7)
        assert len(record["top"]) == 12
    shapes = [record["milliseconds"] for record in records(tmp_path, "attention") if "size" in record]
    assert len(shapes) == 5
    assert all(of["default"] > 0 and of["math"] > 0 for of in shapes)
    views = [record for record in records(tmp_path, "loading") if "view" in record]
    assert all("synthetic" in record["origin"] and record["images_per_second"] > 0 for record in views)
    runs = records(tmp_path, "cifar")
    assert [record["steps"] for record in runs if "steps" in record] == [8] * 3
    for record in runs:
        assert set(record.get("probe", {"trained", "untrained"})) == {"trained", "untrained"}
    page = (tmp_path / "table.md").read_text()
    assert all(f"| {part} | ok |" in page for part in device_day.PARTS)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_leaves_a_table(tmp_path: Path) -> None:
    done = script(tmp_path, "--only", "attention")
    assert done.returncode == 1
    assert "torch sees no GPU here. With --cpu" in (tmp_path / "table.md").read_text()
    assert not records(tmp_path, "attention")


def test_a_part_that_takes_too_long_is_stopped_with_all_that_it_has_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = tmp_path / "part.py"
    stand_in.write_text(
        "import subprocess, sys\nchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid))\nprint('begun', flush=True)\nchild.wait()\n"
    )
    monkeypatch.setattr(device_day, "__file__", str(stand_in))
    assert not device_day.run_process(options(tmp_path), "attention", 2, tmp_path)
    (record,) = records(tmp_path, "attention")
    assert (record["ended"], record["output"]) == ("stopped after 2 s", ["begun"])
    assert record["seconds"] < 10
    child = Path("/proc") / (tmp_path / "child").read_text() / "stat"
    for _ in range(100):  # whoever inherits it takes it away
        if not child.exists() or child.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("what the part had started still runs")


def test_the_last_lines_of_a_part_that_fails_are_its_record_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tools").mkdir()
    stand_in = tmp_path / "tools" / "parts.py"
    stand_in.write_text(
        "import sys\nname = next(word for word in sys.argv if word.startswith('--part='))\n"
        "print('\\n'.join(map(str, range(99)))); print(name)\nsys.exit(7 if name == '--part=machine' else 0)\n"
    )
    monkeypatch.setattr(device_day, "__file__", str(stand_in))
    assert device_day.run_all(options(tmp_path), ["start", "machine", "attention"], tmp_path) == [True, False, True]
    (failed,) = records(tmp_path, "machine")
    assert failed["ended"] == "exit code 7"
    assert failed["output"][-2:] == ["98", "--part=machine"]
    assert len(failed["output"]) == device_day.TAIL
    assert records(tmp_path, "attention")[0]["ended"] == "ok"
    (tmp_path / "out").mkdir()
    device_day.write_output(tmp_path / "out", tmp_path)
    text = (tmp_path / "out" / "output.txt").read_text()
    assert [line for line in text.splitlines() if line.startswith("====")] == [
        "==== start", "==== machine", "==== attention",
    ]  # fmt: skip


def test_parts_that_did_not_start_because_nothing_could_run_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_day, "run_process", lambda *_: False)
    assert device_day.run_all(options(tmp_path), ["start", "attention"], tmp_path) == [False]


def test_limits_scale_and_what_a_part_leaves_goes_to_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {}
    monkeypatch.setattr(device_day, "run_process", lambda _, name, limit, work: limits.setdefault(name, limit) > 0)
    device_day.run_all(options(tmp_path, cpu=False, seconds=270.0), ["start", "machine", "attention"], tmp_path)
    assert limits == pytest.approx({"start": 12.5, "machine": 17.5, "attention": 27.5}, abs=0.5)
    assert sum(device_day.PARTS.values()) == device_day.TOTAL


def test_results_are_not_overwritten_and_some_parts_can_be_run_again(tmp_path: Path) -> None:
    append_record(tmp_path / "results.jsonl", {"part": "machine", "ended": "ok", "seconds": 1.0})
    append_record(tmp_path / "results.jsonl", {"part": "attention", "ended": "exit code 1", "seconds": 1.0})
    done = script(tmp_path, "--cpu")
    assert done.returncode == 2
    assert "holds results already" in done.stderr
    done = script(tmp_path, "--cpu", "--only", "fast")
    assert "--only fast: parts are start, machine," in done.stderr
    assert len(read_records(tmp_path / "results.jsonl")) == 2


def test_a_wait_counts_for_the_line_of_the_package_that_causes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    waits = Waits(Day("cases", Path(), Path(), None, False, time.time()))
    waits.start()
    from sslvit.files import brief

    class Waiting:
        def __repr__(self) -> str:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
            return ""

    brief(Waiting())
    warnings.warn("something else", stacklevel=1)
    waits.end_step(has_logged=False)
    for _ in range(2):
        brief(Waiting())
    waits.end_step(has_logged=True)
    found = waits.stop()
    assert modes == ["warn", "default"]
    ((place, times),) = found.items()
    assert place.startswith("sslvit/files.py:")
    assert times == {"logging": 2, "other": 1}


def test_the_table_says_what_a_gpu_showed(tmp_path: Path) -> None:
    step = {
        "part": "cases", "case": "mae/vit_large_in1k", "mode": "eager", "batch": 256, "images_per_second": 2000.0,
        "mfu": 0.314, "share_of_measured": 0.4, "peak_gib": 23.1, "step_seconds": 0.128, "first_step_seconds": 2.0,
        "split_seconds": {"forward": 0.04, "backward": 0.08, "optimizer": 0.007, "between steps": 0.001},
        "kernels": 980, "kernel_seconds": 0.127, "top": [["gemm|bf16", 200, 64.0, 0.5]],
        "waits": {"sslvit/tasks/base.py:7": {"logging": 3, "other": 0}},
    }  # fmt: skip
    lines = [
        {"part": "machine", "what": "versions", "card": "Card 9", "torch": "2.11.0"},
        {"part": "machine", "what": "copy", "value": 4300.0, "unit": "GB/s"},
        {"part": "gpu_tests", "test": "test_gpu.py::test_x", "outcome": "failed", "seconds": 1, "error": ["E  no"]},
        step,
        {"part": "cases", "case": "igpt/medium_in1k", "mode": "eager", "batch": 16, "note": "out of memory: halved"},
        {"part": "cases", "ended": "ok", "seconds": 150.0},
        {"part": "cifar", "recipe": "mae/vit_tiny_cifar10", "origin": "cifar.tar", "steps": 4000, "loss": 0.2},
        {"part": "cifar", "recipe": "mae/vit_tiny_cifar10", "probe": {"trained": {"kNN": 60.0}}, "images": 5000},
        {"part": "cifar", "recipe": "mae/vit_tiny_cifar10", "probe": {"trained": {"linear": 70.0}}, "images": 5000},
    ]  # fmt: skip
    for line in lines:
        append_record(tmp_path / "results.jsonl", line)
    page = table.write_table(tmp_path)
    assert page == (tmp_path / "table.md").read_text()
    for row in (
        "| cases | ok | 150 |", "| card | Card 9 |", "| copy | 4,300 | GB/s |", "0 passed, 1 failed, 0 skipped.",
        "| mae/vit_large_in1k | eager | 256 | 2,000 | 31 % | 40 % | 23.1 | 128 | 40 / 80 / 7 / 1 | 980 | 127 | 2 |",
        "| igpt/medium_in1k | eager | 16 | out of memory: halved |", "| gemm\\|bf16 | 200 | 64 | 50 % |",
        "| mae/vit_large_in1k, eager | sslvit/tasks/base.py:7 | 3 | 0 |",
        "| mae/vit_tiny_cifar10, trained | 60 | 70 |", "Top-1 accuracy (%) on 5,000 images:",
    ):  # fmt: skip
        assert row in page, row
    assert "Loader" not in page


def test_records_of_several_processes_stay_whole(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    code = (
        f"import sys; sys.path.append({str(ROOT / 'tools')!r})\nfrom pathlib import Path\n"
        "from device_day_parts.common import append_record\n"
        f"for n in range(100): append_record(Path({str(path)!r}), {{'part': 'x', 'text': 'y' * 3000}})"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait() for process in processes] == [0] * 3
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 300


def test_data_are_found_by_name_archives_first(tmp_path: Path) -> None:
    (tmp_path / "Photos").mkdir()
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10-train.tar.gz").touch()
    assert data.find(tmp_path, "photo") == tmp_path / "Photos"
    assert data.find(tmp_path, "cifar") == tmp_path / "cifar10-train.tar.gz"
    assert data.find(tmp_path / "Photos", "cifar") is None
    assert data.find(None, "cifar") is None
