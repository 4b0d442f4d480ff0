"""How far it is, as a terminal shows it and as a log does."""

from __future__ import annotations

import io
import logging
import os
import time
from types import SimpleNamespace

import pytest

from sslvit import progress
from sslvit.messages import MessageHandler
from sslvit.progress import Bar, leave_bars, track, track_counter


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    screen = Terminal()
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=screen))
    monkeypatch.setattr(progress, "REDRAW_SECONDS", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    return screen


def test_a_bar_says_what_is_done_and_the_time_left(terminal: Terminal) -> None:
    bar = Bar("training", 2000, "steps", done=500, start=time.monotonic() - 100)
    bar.draw(1000, "loss 0.5")
    drawn = terminal.getvalue()
    assert drawn == "\rtraining: " + "█" * 10 + "░" * 10 + " 1,000 of 2,000 steps, loss 0.5, 3 min left"
    bar.close()
    assert terminal.getvalue() == drawn + "\r" + " " * (len(drawn) - 1) + "\r"


@pytest.mark.parametrize("plain", ["terminal", "encoding"])
def test_a_plain_terminal_gets_plain_characters(terminal: Terminal, monkeypatch, plain: str) -> None:
    if plain == "terminal":
        monkeypatch.setenv("TERM", "dumb")
    else:
        monkeypatch.setattr(Terminal, "encoding", "ascii")
    bar = Bar("packing", 4, "images")
    bar.draw(1)
    bar.close()
    assert terminal.getvalue().startswith("\rpacking: #####--------------- 1 of 4 images")
    assert terminal.getvalue().isascii()


def test_the_innermost_bar_is_drawn_and_a_message_has_its_line(terminal: Terminal, capsys) -> None:
    outer, inner = Bar("probing", 3, "rows"), Bar("features", 9, "images")
    outer.draw(1)
    assert terminal.getvalue() == ""
    inner.draw(9)
    drawn = len(terminal.getvalue())
    MessageHandler().emit(logging.makeLogRecord({"msg": "a word", "levelno": logging.INFO}))
    assert terminal.getvalue()[drawn:] == "\r" + " " * (drawn - 1) + "\r"
    inner.close()
    outer.draw(2)
    outer.close()
    assert "\rprobing: 1 of 3 rows; features: " + "█" * 20 + " 9 of 9 images" in terminal.getvalue()
    assert "\rprobing: " + "█" * 13 in terminal.getvalue()
    assert Bar.shown == []


def test_units_that_are_not_alike_count_by_their_work(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """After two of three units in two seconds, the last one is as much work as ten."""
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: 2.0))
    bar = Bar("training", 3, "steps", start=0.0, work=lambda units: units + 9.0 * (units == 3))
    bar.draw(2)
    bar.close()
    assert "2 of 3 steps, 10 s left" in terminal.getvalue()


def test_a_bar_that_is_left_stays_and_is_not_drawn_behind_what_follows(terminal: Terminal, monkeypatch) -> None:
    written = []
    monkeypatch.setattr(progress, "os", SimpleNamespace(write=lambda *given: written.append(given), environ=os.environ))
    bar = Bar("training", 3, "steps")
    bar.draw(1)
    before = terminal.getvalue()
    leave_bars()
    bar.draw(2)
    bar.close()
    assert (terminal.getvalue(), written) == (before, [(2, b"\n")])


def test_elsewhere_it_is_a_line_now_and_then_without_rows_of_padding(monkeypatch, caplog) -> None:
    monkeypatch.setattr(progress, "FIRST_REPORT_SECONDS", 0.05)
    monkeypatch.setattr(progress, "MIN_INTERVAL_SECONDS", 0.05)
    with caplog.at_level(logging.INFO, "sslvit.progress"):
        for _ in track(range(3), "features", 10, each=4):
            time.sleep(0.1)
    said = [record.getMessage() for record in caplog.records]
    assert any(line.startswith("features: 4 of 10 images, 0 s left") for line in said)
    assert not any("12 of" in line for line in said)


def test_what_has_no_known_total_is_counted(terminal: Terminal, monkeypatch) -> None:
    monkeypatch.setattr(progress, "FIRST_REPORT_SECONDS", 0.0)
    monkeypatch.setattr(progress, "REDRAW_SECONDS", 0.01)
    monkeypatch.setattr(progress, "shows_bars", lambda: True)
    with track_counter("looking through photos", None) as counter:
        time.sleep(0.1)
        assert terminal.getvalue() == ""  # nothing was found so far
        counter.tick(1500)
        time.sleep(0.1)
    assert terminal.getvalue().startswith("\rlooking through photos: 1,500 images\r")


def test_elsewhere_a_count_without_a_total_is_a_line_once_something_is_done(monkeypatch, caplog) -> None:
    monkeypatch.setattr(progress, "FIRST_REPORT_SECONDS", 0.05)
    monkeypatch.setattr(progress, "MIN_INTERVAL_SECONDS", 0.05)
    with caplog.at_level(logging.INFO, "sslvit.progress"):
        with track_counter("downloading", None, "MB"):
            time.sleep(0.12)
        with track_counter("downloading", None, "MB", lambda: 7):
            time.sleep(0.08)
    assert [record.getMessage() for record in caplog.records] == ["downloading: 7 MB"]


def test_the_inner_of_two_lines_waits(monkeypatch, caplog) -> None:
    monkeypatch.setattr(progress, "FIRST_REPORT_SECONDS", 0.05)
    monkeypatch.setattr(progress, "MIN_INTERVAL_SECONDS", 0.4)
    with caplog.at_level(logging.INFO, "sslvit.progress"), track_counter("outer", 5, "passes") as outer:
        outer.note = "of new crops"
        time.sleep(0.02)
        with track_counter("inner", 9):
            time.sleep(0.2)
    assert [record.getMessage() for record in caplog.records] == ["outer: 0 of 5 passes, of new crops"]


def test_ranks_but_the_first_say_nothing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(progress, "FIRST_REPORT_SECONDS", 0.01)
    with caplog.at_level(logging.INFO, "sslvit.progress"), track_counter("packing", 5):
        time.sleep(0.05)
    assert not caplog.records
