"""The tests that need a GPU, and no others."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest

from device_day_parts.common import ROOT, Day

REASON = "needs a GPU"  # of the tests' skipif marks


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Deselect all other tests, also in pytest-xdist's workers, to which `-p` with this module is passed on."""
    kept = [item for item in items if any(mark.kwargs.get("reason") == REASON for mark in item.iter_markers("skipif"))]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


class Recorder:
    """Pytest plugin that records each outcome as soon as it is known.

    Args:
        day: The part that receives the records.
    """

    def __init__(self, day: Day) -> None:
        self.day = day

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.outcome == "passed":  # skips and errors in fixtures belong to other phases
            return
        said = report.longreprtext.strip().splitlines() if report.outcome == "failed" else []
        errors = [line for line in said if line.startswith("E ")] or said[-3:]
        name = report.nodeid.split("tests/")[-1]
        self.day.record(test=name, outcome=report.outcome, seconds=report.duration, error=errors[:3])


def run_pytest(day: Day, *words: str, plugins: list[Any]) -> None:
    """Run pytest in this process; failed tests are only recorded, while any other problem ends the part."""
    fixed = ["--rootdir", str(ROOT), "-c", str(ROOT / "setup.cfg"), "-p", "no:cacheprovider"]
    code = pytest.main([*fixed, f"--basetemp={day.work / f'pytest-{day.part}'}", *words], plugins=plugins)
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise SystemExit(f"pytest: {code!r}")


def run_part(day: Day) -> None:
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if f'"{REASON}"' in path.read_text()]
    # they spend most of their time starting processes; in parallel they fit into the limit
    side_by_side = ["-n", "4", "--dist", "worksteal"] if find_spec("xdist") and not day.is_cpu else []
    run_pytest(day, "-p", __name__, *side_by_side, *files, plugins=[Recorder(day)])
