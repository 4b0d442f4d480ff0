"""Whatever stands in the files that describe shards is used or refused in one line."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections import Counter
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from shard_fixtures import numbered_shards, numbers_of, png, write_tar

from sslvit.data.header import BadImage
from sslvit.data.index import load_index, read_index
from sslvit.data.scan import ShardReport, index_shards, join_reports, scan_shard
from sslvit.data.schema import check_shard_name, checked_job, checked_report
from sslvit.data.store import PackSettings
from sslvit.files import printable


@pytest.mark.parametrize("seed", [0, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_damaged_tars_and_indices_are_errors_or_skips_and_never_more(tmp_path: Path, seed: int) -> None:
    """Random damage to shard and index: a clear error, or readable samples; never a crash or a wrong exception."""
    numbered_shards(tmp_path / "whole", 12)
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    rng = np.random.default_rng(seed)
    outcomes = set()
    folder = tmp_path / "damaged"
    folder.mkdir()
    for turn in range(200):
        name = ["shard-000000.tar", "index.json", "index.npy"][turn % 3]
        for each, content in files.items():
            (folder / each).write_bytes(content)
        damaged = bytearray(files[name])
        for place in rng.integers(0, len(damaged), rng.integers(1, 40)):
            damaged[place] = rng.integers(256)
        cut = int(rng.integers(1, len(damaged))) if turn % 4 == 0 else len(damaged)
        (folder / name).write_bytes(damaged[:cut])
        try:
            index = load_index(folder)
            outcomes.add(("read", -1 in numbers_of(index)))
            index.key(int(rng.integers(len(index))))
        except ValueError as error:
            outcomes.add("refused" if "sslvit shards index" in str(error) else f"without a remedy: {error}")
        if name.endswith(".tar"):
            try:
                outcomes.add(("indexed", len(index_shards(folder, workers=1)) > 0))
            except ValueError:
                outcomes.add("not indexed")
    assert not {outcome for outcome in outcomes if "without" in outcome}
    assert outcomes >= {("read", True), ("read", False), "refused", ("indexed", True), "not indexed"}


HOSTILE: list = [
    None, True, False, -1, 0, 1, 2, 3, 2**31, 2**63, 10**400, -0.5, 1e308, math.inf, math.nan, "", "x", "x" * 10_000,
    "../../x", "/etc/passwd", "http://elsewhere/x.tar", "a\x1b[2J\nb", "\x00", "\ud800", "caf\udce9", ".", "a/", [], {},
    [[]], [None], {"a": 1}, [1, 2], ["x"] * 1000, "0" * 64, [0.5], [-1], [math.nan], [[4, 4, 1]], [0],
]  # fmt: skip


def mutated(content: object, rng: random.Random) -> object:
    """A copy with one value, at any depth, replaced, doubled, left out or under another name."""
    if isinstance(content, (dict, list)) and content and rng.random() < 0.85:
        copy = content.copy()
        key = rng.choice(list(copy) if isinstance(copy, dict) else range(len(copy)))
        turn = rng.random()
        if turn < 0.1:
            del copy[key]
        elif turn < 0.15 and isinstance(copy, dict):
            copy["other"] = copy.pop(key)
        elif turn < 0.15:
            copy.append(copy[key])
        else:
            copy[key] = mutated(copy[key], rng)
        return copy
    return rng.choice(HOSTILE)


def assert_clear(error: ValueError, remedy: str = "") -> None:
    text = str(error)
    assert len(text) < 300
    assert text.isprintable()
    assert remedy in text


def test_whatever_stands_in_an_index_is_used_or_refused_in_one_line(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    numbered_shards(Path("s"), 12, shard_mb=0.01)
    whole = json.loads(Path("s/index.json").read_text())
    rng, outcomes = random.Random(0), Counter()
    for turn in range(2000):
        content = mutated(whole, rng)
        if rng.random() < 0.3:
            content = mutated(content, rng)
        try:
            index = read_index(json.dumps(content).encode(), Path("s/index.npy"), "s")
        except ValueError as error:
            assert_clear(error, "Make it again: sslvit shards index s")
            outcomes["refused"] += 1
            continue
        outcomes["read"] += 1
        if index.classes is not None:
            np.bincount(index.labels_of(slice(None)), minlength=len(index.classes))
        assert not index.is_remote
        assert all((Path("s") / shard.name).resolve().is_relative_to(tmp_path / "s") for shard in index.shards)
        assert len(index.mean) == len(index.std) == index.channels
        assert index.fingerprint()
        assert index.missing_shards().keys() <= set(range(len(index.shards)))
        assert printable(index.key(3)).isprintable()
        if turn % 10 == 0:
            index.save("s")
            load_index("s")
    assert outcomes["refused"] > 1000
    assert outcomes["read"] > 20


@pytest.mark.parametrize(
    "content", [b"", b"[" * 100_000, b"\xff\xfe", b'{"format": 1' + b"0" * 5000 + b"}", b"null", b"2"]
)
def test_what_is_no_json_is_refused_in_one_line(tmp_path: Path, monkeypatch, content: bytes) -> None:
    monkeypatch.chdir(tmp_path)
    numbered_shards(Path("s"), 2)
    Path("s/index.json").write_bytes(content)
    with pytest.raises(ValueError, match="s/index.json: .*Make it again") as error:
        load_index("s")
    assert_clear(error.value)


WRONG_FIELDS = {
    "channels": [0, 4097, True, 3.0, "3", None], "bits": [7, 32, True, "8"], "image_size": [[8], [8, 0], [8, 8.0], 8],
    "mean": [[], [0.1, 0.2], [math.nan], [math.inf], ["x"], [True], None], "std": [[-0.1], [0.1, 0.2]],
    "classes": [[1], "even", {"even": 0}, ["even"]], "encoding": [None, 3], "orientation": ["", [], None],
    "skipped": [[], {"a": 1}, None],
    "records_sha256": ["", "0" * 63, "G" * 64, 0], "splits": [{}, [], {"train": {}, "val": {}}, {"train": None}],
}  # fmt: skip


WRONG_COLUMNS = {
    "num_samples": [11, -1, True, "12", None], "filenames": [[], ["x.tar"] * 9, "x.tar", [None], ["../x.tar"]],
    "shard_lengths": [[13], [-1], [12.0], [True], None], "bytes": [[-1], [2**63], ["1"]], "sha256": [[""], ["x" * 64]],
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value"),
    [(key, value) for table in (WRONG_FIELDS, WRONG_COLUMNS) for key, values in table.items() for value in values],
)
def test_each_field_of_an_index_is_checked_and_named(tmp_path: Path, monkeypatch, key: str, value: object) -> None:
    monkeypatch.chdir(tmp_path)
    numbered_shards(Path("s"), 12)
    about = json.loads(Path("s/index.json").read_text())
    content = about | {key: value}
    if key in WRONG_COLUMNS:
        content = about | {"splits": {"train": about["splits"]["train"] | {key: value}}}
    Path("s/index.json").write_text(json.dumps(content))
    others = {"classes": "class", "splits": "split", "filenames": "shard|filenames", "shard_lengths": "shard"}
    named = others.get(key, key)
    with pytest.raises(ValueError, match=rf"^s/index.json: .*({named}).*Make it again: sslvit shards index") as raised:
        load_index("s")
    assert_clear(raised.value)
    del about[key if key in WRONG_FIELDS else "bits"]
    Path("s/index.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="the index has no "):
        load_index("s")


def test_records_of_another_number_or_kind_are_refused(tmp_path: Path) -> None:
    index = numbered_shards(tmp_path, 12)
    about = json.loads((tmp_path / "index.json").read_text())
    for records, problem in ((index.records[:11], "11 records for 12 images"), (np.zeros(12), "something else")):
        np.save(tmp_path / "index.npy", records)
        digest = hashlib.sha256((tmp_path / "index.npy").read_bytes()).hexdigest()
        (tmp_path / "index.json").write_text(json.dumps(about | {"records_sha256": digest}))
        with pytest.raises(ValueError, match=f"index.npy holds {problem}.*Make it again"):
            load_index(tmp_path)
    (tmp_path / "index.npy").unlink()
    with pytest.raises(ValueError, match="index.npy is missing.*Make it again"):
        load_index(tmp_path)


def test_whatever_stands_in_the_records_is_used_or_refused_in_one_line(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    numbered_shards(Path("s"), 12)
    about = json.loads(Path("s/index.json").read_text())
    whole, rng, outcomes = Path("s/index.npy").read_bytes(), random.Random(0), Counter()
    for turn in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange([128, len(whole)][turn % 2])] = rng.randrange(256)
        damaged = damaged[: rng.randrange(len(damaged))] if turn % 10 == 0 else damaged
        Path("s/index.npy").write_bytes(damaged)
        content = about | {"records_sha256": hashlib.sha256(damaged).hexdigest()}
        try:
            index = read_index(json.dumps(content).encode(), Path("s/index.npy"), "s")
        except ValueError as error:
            assert_clear(error, "Make it again: sslvit shards index s")
            outcomes["refused"] += 1
            continue
        outcomes["read"] += 1
        assert len(index) == 12
        assert set(index.labels_of(slice(None)).tolist()) <= {-1, 0, 1}
        for sample in range(12):
            with suppress(BadImage):
                assert index.locate(sample)[2] <= index.shards[0].bytes
    assert min(outcomes.values()) > 15


def test_a_label_without_a_class_is_refused_before_it_is_counted(tmp_path: Path, monkeypatch) -> None:
    index = numbered_shards(tmp_path, 12)
    before = index.records["label"].copy()
    index.records["label"][5] = 2**31 - 1
    index.save()
    with pytest.raises(ValueError, match="index.npy has the label 2147483647, which is none of its 2 classes"):
        load_index(tmp_path)
    monkeypatch.setattr("sslvit.data.records.CHECKED_BYTES", 0)  # of a large file only what is used is looked at
    large = load_index(tmp_path)
    assert large.labels_of(np.array([4, 6])).tolist() == before[[4, 6]].tolist()
    with pytest.raises(ValueError, match="/index.npy has the label 2147483647.*Make it again: sslvit shards index"):
        large.labels_of(slice(None))


def test_whatever_stands_in_the_files_of_a_packing_is_used_or_refused_in_one_line(tmp_path: Path) -> None:
    write_tar(tmp_path / "shard-000000.tar", {f"{i}.png": png(i) for i in range(4)} | {"up.png": b"no image"})
    report = scan_shard(tmp_path / "shard-000000.tar")
    report.skipped["caf\udce9.png"] = "zero bytes"
    whole = json.loads(json.dumps(report.as_dict()))
    assert checked_report(whole, "shard-000000.tar") == whole
    job = {
        "images": 4,
        "source": "0" * 64,
        "times": "1" * 64,
        "classes": ["a"],
        **asdict(PackSettings(resize=8)),
        "starts": [0, 2, 4],
    }
    job["passed_over"] = {"a.txt": "no image"}
    assert checked_job(job, PackSettings) == job
    rng, read = random.Random(0), 0
    for turn in range(3000):
        try:
            if turn % 2:
                report = ShardReport.from_dict(checked_report(mutated(whole, rng), "shard-000000.tar"), report.records)
                assert report.shard.name == "shard-000000.tar"
                with suppress(ValueError):
                    join_reports([report], tmp_path, None)
            else:
                content = checked_job(mutated(job, rng), PackSettings)
                PackSettings(**{name: content[name] for name in asdict(PackSettings())})
                assert np.diff(content["starts"]).min(initial=1) > 0
            read += 1
        except ValueError as error:
            assert_clear(error)
    assert 20 < read < 2000
    measured = whole["measured"]
    for change, problem in (
        ({"images": 0}, "moments"), ({"channels": 0, "moments": [[], []]}, "moments"), ({"other": 1}, "unknown"),
        ({"kinds": [[1, 7, 4]]}, "8 or 16"), ({"sizes": [[4, 0, 1]]}, "sizes"), ({"modes": {"L": -1}}, "modes"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=problem):
            checked_report(whole | {"measured": measured | change}, "shard-000000.tar")
    for change in ({"quality": True}, {"resize": 8.0}, {"shard_mb": "8"}, {"shard_mb": math.nan}, {"encode": "\x1b"}):
        with pytest.raises(ValueError, match=next(iter(change))):
            checked_job(job | change, PackSettings)
    assert checked_job(job | {"shard_mb": 8, "resize": None, "classes": None}, PackSettings)
    for name in ("../../x", "/x", "shard-000001.tar", "s3://b/x"):
        with pytest.raises(ValueError, match="it is a report on '.*, not on shard-000000.tar"):
            checked_report(whole | {"shard": whole["shard"] | {"name": name}}, "shard-000000.tar")


def test_a_shards_name_leads_nowhere_else() -> None:
    for name in ("shard-000000.tar", "sub/x.tar", "caf\udce9 \u65e5.tar", "..x.tar", "x:y.tar"):
        assert check_shard_name(name) == name
    for name in (
        "../x.tar",
        "a/../../x.tar",
        "/x.tar",
        "s3://b/x.tar",
        "",
        ".",
        "a/",
        "a\nb.tar",
        "\x1b[2J",
        "\ud800",
        3,
    ):
        with pytest.raises(ValueError, match="shard") as error:
            check_shard_name(name)
        assert_clear(error.value)
