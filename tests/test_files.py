"""Files are whole or absent, folders are held by one process, and names from files cannot forge a line."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from disk_fixtures import files_up_to
from safetensors.torch import save_file

from sslvit.files import (
    WriteError,
    bytes_text,
    cache_folder,
    expand_path,
    explain_os_error,
    in_millions,
    new_file,
    printable,
    to_json,
    write_atomically,
)
from sslvit.locks import is_locked, lock_file, lock_folder


def test_a_failed_write_leaves_the_old_content_and_no_part(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_atomically(path, "old")
    said = "a.txt: could not be written \\(No space left on device\\). Make room"
    with pytest.raises(WriteError, match=said), new_file(path) as part:  # noqa: PT012
        part.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_json_has_null_for_numbers_that_are_not_finite() -> None:
    """Python alone reads NaN; jq, JavaScript and DuckDB refuse the line."""

    def refuse(word: str) -> None:
        raise ValueError(word)

    content = {"a": math.nan, "b": [1.5, -math.inf, {"c": (math.inf, "NaN", True, None, 3)}], "d": 0.1}
    read = json.loads(to_json(content), parse_constant=refuse)
    assert read == {"a": None, "b": [1.5, None, {"c": [None, "NaN", True, None, 3]}], "d": 0.1}
    assert to_json({"a": 1}, indent=1) == '{\n "a": 1\n}'


def test_an_interrupted_write_leaves_no_part(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_file(tmp_path / "a.txt"):
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("save", [torch.save, save_file], ids=["torch", "safetensors"])
def test_a_disk_that_takes_no_more_is_named_by_each_writer(tmp_path: Path, save) -> None:
    said = "weights: could not be written"
    with files_up_to(10_000), pytest.raises(WriteError, match=said), new_file(tmp_path / "weights") as part:
        save({"a": torch.zeros(100_000)}, part)
    assert not list(tmp_path.glob("*weights*"))


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, sync, rename = [], os.fsync, os.replace

    def synced(handle: int) -> None:
        done.append(("sync", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        sync(handle)

    def renamed(old, new) -> None:
        done.append(("rename", Path(old).name))
        rename(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write_atomically(tmp_path / "a.txt", "hello")
    part = f"a.txt.{os.getpid()}.part"
    assert done == [("sync", part), ("rename", part), ("sync", tmp_path.name)]
    done.clear()
    write_atomically(tmp_path / "a.txt", "hello", sync=False)
    assert done == [("rename", part)]


def test_a_held_file_is_held_by_one_and_gone_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    with lock_file(path) as handle:
        os.pwrite(handle, b"note", 0)
        assert path.read_text() == "note"
        with lock_file(path, wait=False) as second:
            assert second is None
        assert path.exists()
    assert not path.exists()
    with lock_file(path, wait=False) as handle:
        assert handle is not None


def test_a_bug_in_the_writer_is_not_called_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes"), new_file(tmp_path / "a"):
        raise RuntimeError("shapes do not fit")


def test_new_files_have_the_mode_of_their_neighbors(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", "text")
    with new_file(tmp_path / "b") as part:
        save_file({"a": torch.zeros(3)}, part)
        part.chmod(0o600)
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "ab"}
    (tmp_path / "plain").write_text("")
    assert modes == {stat.S_IMODE((tmp_path / "plain").stat().st_mode)}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("photo é 猫.jpg", "photo é 猫.jpg"),
        ("a\nsslvit: done", "a\\x0asslvit: done"),
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        ("caf\udce9.jpg", "caf\\xe9.jpg"),
        ("unassigned\u05cd", "unassigned\\u05cd"),
        ("a\u202egpj.exe", "a\\u202egpj.exe"),
        ("x" * 300, "x" * 196 + " ..."),
    ],
)
def test_names_from_files_are_one_harmless_line(text: str, shown: str) -> None:
    assert printable(text) == shown
    printable(text).encode()


def test_errors_of_the_system_name_file_and_remedy() -> None:
    error = OSError(errno.EROFS, os.strerror(errno.EROFS), "/data/x")
    assert explain_os_error(error) == (
        "/data/x: read-only file system. That disk is mounted read-only: choose another place."
    )
    assert explain_os_error(OSError("words of its own")) is None


HOLD = """
import sys, time
from sslvit.locks import lock_folder
with lock_folder(sys.argv[1], "train"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_held_by_one_process_and_free_again_after_kill_9(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match="another process is at work there.*to pack"), lock_folder(tmp_path, "pack"):
        pass
    holder.kill()
    holder.wait()
    deadline = time.monotonic() + 10
    while True:
        try:
            with lock_folder(tmp_path, "pack"):
                return
        except ValueError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_forked_child_does_not_keep_a_folder_of_its_killed_parent(tmp_path: Path) -> None:
    code = """
import os, sys, time
from sslvit.locks import lock_folder
with lock_folder(sys.argv[1], "train"):
    if os.fork() == 0:
        time.sleep(5)
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
    )
    assert holder.stdout.readline() == "held\n"
    holder.kill()
    holder.wait()
    with lock_folder(tmp_path, "train", wait_seconds=2):
        pass
    assert os.listdir(tmp_path) == []
    with lock_folder(tmp_path / "new", "train"):
        pass
    assert os.listdir(tmp_path) == []


def test_a_lock_whose_file_went_meanwhile_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take = fcntl.flock

    def late(handle: int, how: int) -> None:
        (tmp_path / ".lock").unlink()  # by the one who held it, between the opening and the lock
        take(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(ValueError, match="another process is at work"), lock_folder(tmp_path, "train"):
        pass


def test_a_glance_at_a_lock_keeps_nobody_from_it(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    with open(tmp_path / ".lock") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        threading.Timer(0.05, fcntl.flock, (file, fcntl.LOCK_UN)).start()
        with lock_folder(tmp_path, "train"):
            assert is_locked(tmp_path / ".lock")
    assert not is_locked(tmp_path / ".lock")


def test_a_process_that_waits_gets_the_folder_when_the_other_has_ended(tmp_path: Path, capsys) -> None:
    def hold() -> None:
        with lock_folder(tmp_path, "train"):
            is_held.set()
            time.sleep(0.4)
            is_ended.set()

    is_held, is_ended = threading.Event(), threading.Event()
    thread = threading.Thread(target=hold)
    thread.start()
    is_held.wait()
    with lock_folder(tmp_path, "train", wait_seconds=10):
        assert is_ended.is_set()
    assert capsys.readouterr().out.count("waiting up to 10 s") == 1


def test_home_and_variables_are_expanded_and_addresses_are_not(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA", "/data")
    assert cache_folder("~/.cache/sslvit") == Path(os.environ["XDG_CACHE_HOME"]) / "sslvit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert expand_path("~/photos") == f"{tmp_path}/photos"
    assert expand_path("$DATA/photos") == "/data/photos"
    assert expand_path("https://host/~me/$x") == "https://host/~me/$x"
    assert cache_folder("~/.cache/sslvit") == tmp_path / ".cache/sslvit"


@pytest.mark.parametrize("home", ["/nonexistent-home", None], ids=["not writable", "unknown"])
def test_caches_go_to_a_private_temporary_folder_without_a_home(monkeypatch, tmp_path: Path, capsys, home) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("sslvit.files._reported_folders", set())
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", home or "~nobody-here")
    if home:
        monkeypatch.setattr("os.access", lambda path, mode: False)
    folder = cache_folder("~/.cache/sslvit")
    assert folder == tmp_path / f"sslvit-{os.getuid()}" / ".cache/sslvit"
    assert stat.S_IMODE((tmp_path / f"sslvit-{os.getuid()}").stat().st_mode) == 0o700
    assert "no home folder" in capsys.readouterr().out


def test_a_small_network_is_not_of_zero_millions() -> None:
    assert [in_millions(count) for count in (999, 12_345, 999_999, 1_000_000, 2.71e6, 307_000_000)] == [
        "999", "12,345", "999,999", "1.0 M", "2.7 M", "307.0 M"
    ]  # fmt: skip


def test_a_number_of_bytes_is_told_in_the_unit_that_leaves_few_digits() -> None:
    texts = {7: "7 bytes", 999: "999 bytes", 1500: "1.46 KB", 1_023_000: "999 KB", 1_023_600: "0.976 MB"}
    texts |= {123_456_789: "118 MB", 1_047_000_000: "998 MB", 1_048_300_000: "1.0 GB", 3 * 2**40: "3,072.0 GB"}
    assert {count: bytes_text(count) for count in texts} == texts
