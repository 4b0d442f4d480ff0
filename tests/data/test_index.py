"""Shards of others are read and ours are read by others; what is damaged or dangerous is named."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import pickle
import random
import tarfile
import tracemalloc
from collections import Counter
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shard_fixtures import contents, encoded, image_folder, numbered_shards, numbers_of, photograph

from sslvit.cli import main
from sslvit.data.decode import BadImage, decode
from sslvit.data.index import RECORD, load_index, read_index
from sslvit.data.inspect import check_shards, describe_shards
from sslvit.data.loader import make_batch
from sslvit.data.mixture import JoinedIndex
from sslvit.data.open import check_present, expand, open_shards
from sslvit.data.pack import pack_source
from sslvit.data.plan import EpochPlan
from sslvit.data.reader import ShardReader
from sslvit.data.remote import ShardCache
from sslvit.data.scan import IndexOptions, ShardReport, index_shards, join_reports, scan_shard
from sslvit.data.schema import check_shard_name, checked_job, checked_report
from sslvit.data.store import PackSettings
from sslvit.data.views import Views
from sslvit.files import WriteError, printable
from sslvit.settings.views import CenterSettings


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))


def png(value: int) -> bytes:
    return encoded(Image.new("L", (4, 4), value), "PNG")


def test_webdataset_reads_our_shards(tmp_path: Path) -> None:
    import webdataset

    (index,) = pack_source(image_folder(tmp_path / "in"), tmp_path / "out")
    found = webdataset.WebDataset(str(tmp_path / "out" / index.shards[0].name), shardshuffle=False).to_tuple(
        "png", "cls"
    )
    labels = {decode(png)[:2, 0, 0].numpy().tobytes(): int(cls) for png, cls in found}
    assert len(labels) == 20
    assert all(key[0] == label for key, label in labels.items())


@pytest.mark.parametrize("compact", [True, False])
def test_shards_written_by_webdataset_are_indexed(tmp_path: Path, compact: bool) -> None:
    import webdataset

    (tmp_path / "theirs").mkdir()
    with webdataset.ShardWriter(str(tmp_path / "theirs" / "x-%03d.tar"), maxcount=3, verbose=0) as writer:
        for i in range(10):
            pixels = np.full((6, 8, 3), (i % 2, i, 0), np.uint8)
            sample = {"__key__": f"s/{i:04d}", "png": Image.fromarray(pixels), "cls": i % 2, "json": {"i": i}}
            writer.write(sample if compact else sample | {"seg.png": Image.new("L", (4, 4), 200)})
    index = index_shards(tmp_path / "theirs")
    assert [shard.samples for shard in index.shards] == [3, 3, 3, 1]
    assert contents(index) == {(i % 2, i): i % 2 for i in range(10)}
    assert load_index(tmp_path / "theirs").classes == ["0", "1"]


def test_timm_reads_our_shards_by_the_file_that_it_expects(tmp_path: Path) -> None:
    from timm.data import create_dataset

    numbered_shards(tmp_path / "train", 20, shard_mb=0.01)
    dataset = create_dataset(
        "wds/numbers", root=str(tmp_path / "train"), split="train", is_training=False, batch_size=1,
        input_img_mode="L",
    )  # fmt: skip
    found = [(np.asarray(image)[0, 0], label) for image, label in dataset]
    assert sorted(found) == [(i, i % 2) for i in range(20)]
    theirs, ours = (json.loads((tmp_path / "train" / name).read_text()) for name in ("_info.json", "index.json"))
    assert theirs["splits"]["train"].items() <= ours["splits"]["train"].items()


def test_the_index_is_plain_tar_arithmetic(tmp_path: Path) -> None:
    (index,) = pack_source(image_folder(tmp_path / "in"), tmp_path / "out")
    with tarfile.open(tmp_path / "out" / index.shards[0].name) as tar:
        members = {m.offset_data: m for m in tar if m.name.endswith(".png")}
    sizes = {offset: member.size for offset, member in members.items()}
    assert {int(record["offset"]): int(record["size"]) for record in index.records} == sizes
    assert all(member.mtime == 0 for member in members.values())


def test_indexing_packed_shards_again_finds_the_same(tmp_path: Path) -> None:
    index = numbered_shards(tmp_path, 20, shard_mb=0.01)
    again = index_shards(tmp_path)
    assert again.classes == ["even", "odd"]  # which the tars do not know
    assert np.array_equal(again.records, index.records)
    assert (again.mean, again.std, again.image_size) == (index.mean, index.std, index.image_size)
    assert again.fingerprint() == index.fingerprint()


class Harmful:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_dangerous_members_are_refused_and_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    content = pickle.dumps(Harmful(tmp_path / "harmed"))
    write_tar(tmp_path / "a.tar", {
        "ok.png": png(5), "../up.png": png(6), "/root.png": png(7), "b.pyd": content, "c.pth": content,
        "c.png": png(8), "d.pkl": content,
    })  # fmt: skip
    index = index_shards(tmp_path, workers=1)
    assert sorted(numbers_of(index)) == [5, 8]
    assert index.skipped == {
        "a.tar/../up.png": "a path that leads out of its folder",
        "a.tar//root.png": "a path that leads out of its folder",
        "a.tar/b.pyd": "a pickle, which would run code", "a.tar/c.pth": "a pickle, which would run code",
        "a.tar/d.pkl": "a pickle, which would run code",
    }  # fmt: skip
    assert "skipped 5 entries" in capsys.readouterr().out
    assert not (tmp_path / "harmed").exists()
    assert load_index(tmp_path).skipped == index.skipped


@pytest.mark.parametrize(
    ("members", "message"),
    [({"a.txt": b"hello"}, "hold no images"), ({"a.png": b"nonsense"}, "hold no images .a.tar/a.png: not an image")],
)
def test_shards_without_images_are_refused(tmp_path: Path, members: dict, message: str) -> None:
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(ValueError, match=message):
        index_shards(tmp_path)


def test_odd_members_are_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_tar(tmp_path / "a.tar", {
        "a.png": png(1), "a.jpg": png(2), "a.cls": b"0", "b.png": png(3), "b.cls": b"dog",
        "c.png": png(4), "c.cls": b"-3",
    })  # fmt: skip
    index = index_shards(tmp_path)
    assert sorted(numbers_of(index)) == [1, 3, 4]
    assert index.classes is None
    assert index.skipped == {"a.tar/a.jpg": "a second image of its key"}
    assert "a label of -3; classes count from 0; they are not used" in capsys.readouterr().out


def test_labels_that_only_some_images_have_are_not_used_and_it_is_said(tmp_path: Path, capsys) -> None:
    write_tar(tmp_path / "a.tar", {"a.png": png(1), "a.cls": b"0", "b.png": png(2), "c.png": png(3)})
    assert index_shards(tmp_path).classes is None
    assert "2 of 3 images have no label (.cls), so the others' are not used either" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--labels cls: 2 of 3 images of .* have none"):
        index_shards(tmp_path, options=IndexOptions(labels="cls"))


def test_a_shard_without_labels_among_others_leaves_all_without_and_it_is_said(tmp_path: Path, capsys) -> None:
    write_tar(tmp_path / "a.tar", {"a.png": png(1), "a.cls": b"0", "b.png": png(2), "b.cls": b"1"})
    write_tar(tmp_path / "b.tar", {f"{i}.png": png(i) for i in (3, 4, 5)})
    index = index_shards(tmp_path)
    assert (len(index), index.classes) == (5, None)
    assert index.records["label"].tolist() == [-1] * 5
    assert "3 of 5 images have no label (.cls), so the others' are not used either" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--labels cls: 3 of 5 images of .* have none"):
        index_shards(tmp_path, options=IndexOptions(labels="cls"))


def test_labels_of_minus_one_in_shards_of_others_are_none(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_tar(tmp_path / "a.tar", {"a.png": png(1), "a.cls": b"-1", "b.png": png(2), "b.cls": b"-1"})
    assert index_shards(tmp_path).classes is None
    assert "2 of 2 labels are -1, which marks images without a class; they are not used" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--labels cls: 2 of 2 labels are -1.*Leave it out to index them without"):
        index_shards(tmp_path, options=IndexOptions(labels="cls"))


def test_numbers_that_are_no_classes_are_not_taken_for_some(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_tar(tmp_path / "a.tar", {"a.png": png(1), "a.cls": b"30000000"})
    assert index_shards(tmp_path).classes is None
    assert "labels up to 30000000 for 1 images are no class numbers" in capsys.readouterr().out


@pytest.mark.parametrize("harm", ["header", "cut at a member", "cut in a header", "cut in an image", "negative size"])
def test_a_truncated_tar_gives_what_is_readable_and_says_so(tmp_path: Path, harm: str) -> None:
    write_tar(tmp_path / "a.tar", {f"{i}.png": png(i) for i in range(10)})
    content = bytearray((tmp_path / "a.tar").read_bytes())
    each = 1024  # header and one block
    if harm == "header":
        content[5 * each + 150] ^= 0xFF
    elif harm == "negative size":
        about = tarfile.TarInfo("5.txt")
        about.size = -512
        content[5 * each : 5 * each + 512] = about.tobuf(tarfile.GNU_FORMAT)
    else:
        del content[5 * each + {"cut at a member": 0, "cut in a header": 100, "cut in an image": 530}[harm] :]
    (tmp_path / "a.tar").write_bytes(content)
    write_tar(tmp_path / "b.tar", {"x.png": png(200)})
    index = index_shards(tmp_path, workers=1)
    assert numbers_of(index) == [0, 1, 2, 3, 4, 200]
    assert "truncated tar: 5 images read, what follows is lost" in index.skipped["a.tar"]


def test_programs_are_not_started_for_images(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"a.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "b.png": png(7)})
    index = index_shards(tmp_path)
    assert numbers_of(index) == [7]
    assert index.skipped == {"a.tar/a.png": "not an image (UnidentifiedImageError)"}


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    index = numbered_shards(tmp_path, 3)
    with pytest.raises(FileNotFoundError, match="sslvit shards pack"):
        load_index(tmp_path / "elsewhere")
    whole = (tmp_path / "index.json").read_text()
    about = json.loads(whole)
    split = about["splits"]["train"]
    for change, what in (
        ({"shard_lengths": [4]}, "num_samples is 3, but its shards hold 4"),
        ({"shard_lengths": []}, "shard_lengths has 0 entries for 1 shards"),
        ({"filenames": [3]}, "the name of a shard is 3, expected a string"),
        ({"bytes": "x"}, "bytes is 'x', expected a list"),
    ):
        (tmp_path / "index.json").write_text(json.dumps(about | {"splits": {"train": split | change}}))
        with pytest.raises(ValueError, match=f"/index.json: {what}. Make it again: sslvit shards index {tmp_path}"):
            load_index(tmp_path)
    (tmp_path / "index.json").write_text(whole.replace(index.shards[0].name, "../../etc/passwd"))
    with pytest.raises(ValueError, match="lies outside of its folder"):
        load_index(tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON .*Make it again"):
        load_index(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps(about | {"format": 99}))
    with pytest.raises(ValueError, match="format 99, this sslvit reads"):
        load_index(tmp_path)


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


def test_patterns_name_some_shards_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    index = numbered_shards(tmp_path / "in", 30, shard_mb=0.01)
    cache = ShardCache(tmp_path / "cache")
    names = [shard.name for shard in index.shards]
    assert expand(f"{tmp_path}/in/shard-{{000000..000002}}.tar") == [f"{tmp_path}/in/{name}" for name in names[:3]]
    part = open_shards(f"{tmp_path}/in/shard-{{000001..000002}}.tar", cache)
    first, last = index.first_of_shard[[1, 3]]
    assert numbers_of(part) == numbers_of(index)[first:last]
    assert part.classes == ["even", "odd"]
    for name in ("index.json", "index.npy"):
        (tmp_path / "in" / name).unlink()
    for _ in range(2):
        assert numbers_of(open_shards(f"{tmp_path}/in/shard-{{000001..000002}}.tar", cache)) == numbers_of(part)
    assert capsys.readouterr().out.count("indexing them once") == 1
    with pytest.raises(FileNotFoundError, match="shard-000077.tar does not exist"):
        open_shards(f"{tmp_path}/in/shard-{{000077..000078}}.tar", cache)
    with pytest.raises(ValueError, match="braces that do not close"):
        open_shards(f"{tmp_path}/in/shard-{{00..03.tar", cache)


@pytest.mark.parametrize(("chosen", "is_mapped"), [([0, 1, 2, 3], True), ([1, 2], True), ([2], True), ([2, 0], False)])
def test_a_pattern_leaves_the_records_of_neighbors_in_their_file(
    tmp_path: Path, chosen: list[int], is_mapped: bool
) -> None:
    index = numbered_shards(tmp_path, 40, shard_mb=0.02)
    assert len(index.shards) == 4
    pattern = f"{tmp_path}/shard-{{{','.join(f'{n:06d}' for n in chosen)}}}.tar".replace("{000002}", "000002")
    part = open_shards(pattern, ShardCache(tmp_path / "cache"))
    numbers = numbers_of(index)
    expected = [number for n in chosen for number in numbers[index.first_of_shard[n] : index.first_of_shard[n + 1]]]
    assert numbers_of(part) == expected
    assert part.labels_of(slice(None)).tolist() == [number % 2 for number in expected]
    assert isinstance(part.records, np.memmap) == is_mapped


def test_tars_that_the_index_does_not_list_are_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    numbered_shards(tmp_path, 4)
    open_shards(tmp_path)
    assert "NOT read" not in capsys.readouterr().out
    write_tar(tmp_path / "later.tar", {f"{i}.png": png(i) for i in range(4)})
    assert len(open_shards(tmp_path)) == 4
    words = f"1 of 2 tar files there are not in index.json and are NOT read (the first: later.tar). To read them too: sslvit shards index {tmp_path}"  # noqa: E501
    assert words in capsys.readouterr().out
    assert words in describe_shards(load_index(tmp_path))
    index_shards(tmp_path)
    assert len(open_shards(tmp_path)) == 8
    assert "NOT read" not in capsys.readouterr().out


def test_equal_names_in_two_folders_are_two_shards(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "x.tar", {f"{i}.png": png(10 * number + i) for i in range(4)})
    index = open_shards(f"{tmp_path}/{{a,b}}/x.tar", ShardCache(tmp_path / "cache"))
    keys = [index.key(sample) for sample in range(8)]
    assert keys == [f"{name}/x.tar/{i}.png" for name in "ab" for i in range(4)]
    alone = open_shards(f"{tmp_path}/a/x.tar", ShardCache(tmp_path / "cache"))
    assert alone.key(0) == "x.tar/0.png"


def test_missing_shards_of_a_mixture_are_those_of_one_source(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    small, large = numbered_shards(tmp_path / "a", 4), numbered_shards(tmp_path / "b", 200)
    joined = JoinedIndex([small, large], [1, 1])
    check_present(joined, 0.01)
    small.shard_path(0).unlink()
    assert joined.missing_shards() == {0: "missing shard"}
    check_present(joined, 0.05)
    said = capsys.readouterr().out
    assert f"1 shards cannot be read, 4 of 204 samples ({tmp_path}/a/shard-000000.tar: missing shard)" in said
    with pytest.raises(ValueError, match="4 of 204 samples"):
        check_present(joined, 0.01)
    other = JoinedIndex([large, small], [1, 1])
    assert other.missing_shards() == {1: "missing shard"}


def test_an_index_of_other_bytes_than_it_describes_is_refused(tmp_path: Path) -> None:
    index = numbered_shards(tmp_path, 6)
    records = index.records.copy()
    records["label"] = 1 - records["label"]  # which would look right
    np.save(tmp_path / "index.npy", records)
    with pytest.raises(ValueError, match="index.npy is not the one that it describes. Make it again"):
        load_index(tmp_path)


def test_a_fingerprint_is_of_the_bytes_of_all_shards_in_their_order(tmp_path: Path) -> None:
    one, other = numbered_shards(tmp_path / "a", 40, shard_mb=0.02), numbered_shards(tmp_path / "b", 40, 0.02, first=99)
    checksums = "".join(hashlib.sha256(one.shard_path(n).read_bytes()).hexdigest() for n in range(len(one.shards)))
    assert one.fingerprint() == hashlib.sha256(checksums.encode()).hexdigest()[:16]
    assert one.fingerprint() != other.fingerprint()
    pattern = f"{tmp_path}/a/shard-{{000001,000000,000002,000003}}.tar"
    assert open_shards(pattern, ShardCache(tmp_path / "cache")).fingerprint() != one.fingerprint()


def test_local_shards_that_were_replaced_are_indexed_anew(tmp_path: Path) -> None:
    cache, pattern = ShardCache(tmp_path / "cache"), f"{tmp_path}/{{a,b}}.tar"
    for name, number in (("a", 1), ("b", 2)):
        write_tar(tmp_path / f"{name}.tar", {"x.png": png(number)})
    before = open_shards(pattern, cache)
    write_tar(tmp_path / "b.tar", {"y.png": png(9), "z.png": png(8)})
    after = open_shards(pattern, cache)
    assert (numbers_of(before)[:1], numbers_of(after)) == ([1], [1, 9, 8])


def test_shards_in_a_folder_that_one_may_only_read_are_indexed_in_the_cache(tmp_path: Path, monkeypatch) -> None:
    index = numbered_shards(tmp_path / "theirs", 20, shard_mb=0.01)
    for name in ("index.json", "index.npy", "_info.json"):
        (tmp_path / "theirs" / name).unlink()
    before = sorted((tmp_path / "theirs").iterdir())
    monkeypatch.setattr("os.access", lambda path, mode: False)
    found = open_shards(tmp_path / "theirs", ShardCache(tmp_path / "cache"))
    assert numbers_of(found) == numbers_of(index)
    assert sorted((tmp_path / "theirs").iterdir()) == before


def test_check_finds_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = image_folder(tmp_path / "in")
    (source / "dog" / "again.png").write_bytes((source / "dog" / "im.003.png").read_bytes())
    (source / "cat" / "gray.png").write_bytes(encoded(photograph(40, 50).convert("L"), "PNG"))
    (index,) = pack_source(source, tmp_path / "out", workers=1)
    found = check_shards(index, workers=1)
    assert found.is_whole
    assert [sorted(map(index.key, samples)) for samples in found.duplicates] == [
        ["shard-000000.tar/dog/again.png", "shard-000000.tar/dog/im_003.png"]
    ]
    assert found.modes == {"RGB": 21, "L": 1}
    assert found.sizes == {6: 21, 40: 1}
    assert main(["shards", "check", str(tmp_path / "out")]) == 0
    shard, offset, size = index.locate(5)
    with open(index.shard_path(shard), "r+b") as file:
        file.seek(offset)
        file.write(bytes(size))
    capsys.readouterr()
    assert main(["shards", "check", str(tmp_path / "out"), "--workers", "1"]) == 1
    out = capsys.readouterr().out
    assert "damaged shards: 1\n    shard-000000.tar: its bytes do not have the checksum" in out
    assert f"corrupt images: 1\n    {index.key(5)}: not an image" in out
    assert "more than once (same bytes): 1" in out
    index.shard_path(shard).unlink()
    assert main(["shards", "check", str(tmp_path / "out")]) == 1


def test_what_an_index_says_reaches_the_screen_in_plain_characters(tmp_path: Path) -> None:
    index = numbered_shards(tmp_path, 3)
    index.encoding, index.skipped = "\x1b[2J\x07", {"a\x1b": "b\x1b]0;title\x07"}
    assert not {"\x1b", "\x07"} & set(describe_shards(index))


def test_labels_below_zero_are_none_of_the_classes(tmp_path: Path) -> None:
    index = numbered_shards(tmp_path, 3)
    index.records = index.records.copy()
    index.records["label"][1] = -1
    index.save()
    with pytest.raises(ValueError, match="has the label -1, which is none of its 2 classes"):
        load_index(tmp_path)


def test_info_says_what_a_job_needs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    index = numbered_shards(tmp_path, 30, shard_mb=0.01)
    text = describe_shards(index, 24)
    assert "30 images (8x8, 1 channels, 2 classes)" in text
    assert "at a global batch of 24: 1 steps per epoch, each dropping 6 images" in text
    assert "ranks that fit: 1, 2, 3, 4, 6, 8, 12, 24" in text
    assert "images per class: 15\n" in text
    assert "cache" in text
    assert main(["shards", "info", str(tmp_path), "--global-batch-size", "8"]) == 0
    assert "ranks that fit: 1, 2, 4, 8" in capsys.readouterr().out


def kilobytes_in_memory(path: Path) -> int:
    """How much of a file's mappings this process has touched."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    mapped = [number for number, line in enumerate(lines) if line.endswith(str(path))]
    sizes = [next(line for line in lines[number:] if line.startswith("Rss:")) for number in mapped]
    assert sizes
    return sum(int(line.split()[1]) for line in sizes)


def test_a_sparse_index_of_a_billion_samples_is_not_read_whole(tmp_path: Path, monkeypatch) -> None:
    """100,000 shards x 10,000 samples: only what is touched is read, and no order of all samples is ever made."""
    shards, each = 100_000, 10_000
    names = [f"shard-{i:06d}.tar" for i in range(shards)]
    part = np.lib.format.open_memmap(tmp_path / "index.npy", "w+", RECORD, (shards * each,))
    del part
    split = {
        "name": "train", "num_samples": shards * each, "filenames": names, "shard_lengths": [each] * shards,
        "bytes": [1 << 28] * shards, "sha256": ["0" * 64] * shards,
    }  # fmt: skip
    fields = {"classes": ["a"], "channels": 3, "bits": 8, "mean": [0.0] * 3, "std": [1.0] * 3, "image_size": None}
    about = {"format": 3, "records_sha256": "0" * 64, **fields, "encoding": "", "skipped": {}, "orientation": "upright"}
    (tmp_path / "index.json").write_text(json.dumps(about | {"splits": {"train": split}}))
    monkeypatch.setattr("sslvit.data.index.sha256_of", lambda path: pytest.fail("a checksum reads the whole file"))
    index = load_index(tmp_path)
    tracemalloc.start()
    plan = EpochPlan(index.shard_samples, 65_536)
    samples, _ = plan.batch(40_000, 160, 176)
    places = [index.locate(int(sample)) for sample in samples]
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2**20 * 64  # an order of all samples takes 8 GB
    assert [place[0] for place in places] == (samples // each).tolist()
    assert index.labels_of(samples).tolist() == [0] * 16
    assert kilobytes_in_memory(tmp_path / "index.npy") < 32 * 1024  # of 16 GB


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
    monkeypatch.setattr("sslvit.data.index.CHECKED_BYTES", 0)  # of a large file only what is used is looked at
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


def test_names_that_are_not_utf8_survive_the_index(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.tar")
    header = tarfile.TarInfo(os.fsdecode(b"\xe9t\xe9.png")).tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
    about = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    about.size = len(png(7))
    with tarfile.open(tmp_path / name, "w", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(about, io.BytesIO(png(7)))
    index = index_shards(tmp_path, workers=1)
    index.skipped, index.classes = {os.fsdecode(b"\xff.png"): "zero bytes"}, [os.fsdecode(b"\xe9")]
    index.records["label"] = 0
    index.save()
    again = load_index(tmp_path)
    assert (again.skipped, again.classes, again.shards) == (index.skipped, index.classes, index.shards)
    assert numbers_of(again) == [7]
    assert os.fsencode(again.key(0)) == b"caf\xe9.tar/\xe9t\xe9.png"
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes().replace(b"IHDR", b"XXXX"))
    views = Views(CenterSettings(), [4, 4], "bilinear", seed=0)
    batch = make_batch(ShardReader(again, 1, 0), views, np.array([0]), np.array([0]))
    assert list(batch.unreadable) == ["caf\\xe9.tar/\\xe9t\\xe9.png"]  # as it is printed


def test_an_index_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch) -> None:
    index = numbered_shards(tmp_path, 12)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for where in ("numpy.lib.format.write_array_header_1_0", "pathlib.Path.write_bytes"):
        index.encoding = "something else"
        with monkeypatch.context() as patch:
            patch.setattr(where, full)
            with pytest.raises(WriteError, match=r"index\.|_info.*No space left.*Make room"):
                index.save()
        assert load_index(tmp_path).encoding == ""
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_unreadable_images_do_not_hide_in_statistics(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"a.png": png(100), "b.png": b"nonsense", "c.png": png(200)})
    index = index_shards(tmp_path)
    assert index.mean == pytest.approx([150 / 255], abs=1e-4)
    assert numbers_of(index) == [100, 200]
    assert index.skipped == {"a.tar/b.png": "not an image (UnidentifiedImageError)"}
    with open(tmp_path / "a.tar", "r+b") as file:  # damage that came later
        file.seek(index.locate(1)[1])
        file.write(bytes(16))
    assert ShardReader(index, 1).unreadable.keys() == {1}


# ---- tars as people write them -----------------------------------------------------------------------------------


@pytest.mark.parametrize("field_name", ["cls", "txt"])
def test_class_names_in_shards_become_classes_as_those_of_folders_do(tmp_path: Path, field_name: str) -> None:
    for number, names in enumerate((("cat", "dog"), ("ant", "cat"))):
        members = {f"{i}.png": png(10 * number + i) for i in range(2)}
        members |= {f"{i}.{field_name}": f"{name}\n".encode() for i, name in enumerate(names)}
        write_tar(tmp_path / f"{number}.tar", members | {f"x{number}.png": png(90), f"x{number}.{field_name}": b"cat"})
    index = index_shards(tmp_path, workers=1)
    assert index.classes == ["ant", "cat", "dog"]
    named = [index.classes[label] for label in index.labels_of(slice(None))]
    assert dict(zip(numbers_of(index), named, strict=True)) == {0: "cat", 1: "dog", 10: "ant", 11: "cat", 90: "cat"}
    assert load_index(tmp_path).classes == index.classes


def test_captions_are_not_classes_unless_asked_for_and_it_is_said(tmp_path: Path, capsys) -> None:
    members = {f"{i}.png": png(i) for i in range(4)} | {f"{i}.txt": f"a photo number {i}".encode() for i in range(4)}
    write_tar(tmp_path / "a.tar", members)
    assert index_shards(tmp_path, workers=1).classes is None
    assert "4 different texts (.txt) for 4 images are no classes; they are not used" in capsys.readouterr().out
    write_tar(tmp_path / "a.tar", members | {"0.txt": b"long " * 100, "1.json": b"{}"})
    assert index_shards(tmp_path, workers=1).classes is None
    assert "the .txt members are not used as labels (--labels txt uses them)" in capsys.readouterr().out
    write_tar(tmp_path / "a.tar", members)
    assert len(index_shards(tmp_path, workers=1, options=IndexOptions(labels="txt")).classes) == 4


def test_numbers_and_names_together_are_names_and_it_is_said(tmp_path: Path, capsys) -> None:
    write_tar(tmp_path / "a.tar", {"a.png": png(1), "a.cls": b"0", "b.png": png(2), "b.cls": b"dog"})
    assert index_shards(tmp_path).classes == ["0", "dog"]
    assert "some labels are numbers, others names (dog); all are taken as names" in capsys.readouterr().out


def test_keys_with_dots_are_samples_and_other_fields_are_not(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {
        "photo.0001.jpg": png(1), "photo.0002.jpg": png(2), "photo.0001.cls": b"cat", "photo.0002.cls": b"dog",
        "photo.jpg": png(3), "photo.cls": b"cat", "x.seg.png": png(90), "x.png": png(4), "x.cls": b"dog",
        "y.edited.png": png(5), "y.cls": b"cat",
    })  # fmt: skip
    index = index_shards(tmp_path, workers=1)
    assert numbers_of(index) == [1, 2, 3, 4, 5]
    assert index.labels_of(slice(None)).tolist() == [0, 1, 0, 1, 0]
    assert index.skipped == {
        "a.tar/*.seg.png": "1 images in another field of their keys (--image seg.png takes these instead)"
    }
    assert [index.key(i) for i in range(2)] == ["a.tar/photo.0001.jpg", "a.tar/photo.0002.jpg"]


def test_of_two_images_to_a_key_the_user_chooses(tmp_path: Path, capsys) -> None:
    pairs = {f"{i}.{side}.png": png(10 * i + (side == "right")) for i in range(3) for side in ("left", "right")}
    write_tar(tmp_path / "a.tar", pairs)
    with pytest.raises(ValueError, match=r"hold no images \(a.tar/0.\*: 2 images of one key \(left.png, right.png\): "
                                         r"choose one, as with --image left.png"):  # fmt: skip
        index_shards(tmp_path, workers=1)
    index = index_shards(tmp_path, workers=1, options=IndexOptions(image="right.png"))
    assert numbers_of(index) == [1, 11, 21]
    assert index.skipped.keys() == {"a.tar/*.left.png"}
    assert main(["shards", "index", str(tmp_path), "--image", "left.png"]) == 0
    assert numbers_of(load_index(tmp_path)) == [0, 10, 20]


def test_archives_put_one_behind_the_other_are_read_to_the_last(tmp_path: Path) -> None:
    for number in range(3):
        write_tar(tmp_path / f"{number}.part", {f"{number}-{i}.png": png(10 * number + i) for i in range(2)})
    whole = b"".join((tmp_path / f"{number}.part").read_bytes() for number in range(3))
    (tmp_path / "a.tar").write_bytes(whole)
    index = index_shards(tmp_path, workers=1)
    assert numbers_of(index) == [0, 1, 10, 11, 20, 21]
    assert not index.skipped


def test_links_in_a_tar_are_the_images_they_point_to(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        about = tarfile.TarInfo("d/a.png")
        about.size = len(png(7))
        tar.addfile(about, io.BytesIO(png(7)))
        for name, kind, target in [
            ("d/hard.png", tarfile.LNKTYPE, "d/a.png"), ("e/soft.png", tarfile.SYMTYPE, "../d/a.png"),
            ("lost.png", tarfile.SYMTYPE, "/etc/passwd"), ("pipe.png", tarfile.FIFOTYPE, ""),
        ]:  # fmt: skip
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            tar.addfile(link)
    index = index_shards(tmp_path, workers=1)
    assert numbers_of(index) == [7, 7, 7]
    assert index.skipped == {
        "a.tar/lost.png": "a link to /etc/passwd, which is not before it in the tar",
        "a.tar/pipe.png": "not a regular file",
    }


@pytest.mark.parametrize(("mode", "kind"), [("w:gz", "a gzip file"), ("w:bz2", "a bzip2 file"), ("w:xz", "an xz file")])
def test_a_compressed_tar_is_called_one(tmp_path: Path, mode: str, kind: str) -> None:
    with tarfile.open(tmp_path / "a.tar", mode) as tar:
        about = tarfile.TarInfo("a.png")
        about.size = len(png(7))
        tar.addfile(about, io.BytesIO(png(7)))
    with pytest.raises(ValueError, match=f"hold no images .a.tar: {kind}, not a plain tar. Unpack it once"):
        index_shards(tmp_path, workers=1)
    (tmp_path / "a.tar").rename(tmp_path / "a.tar.gz")
    with pytest.raises(
        ValueError, match="no .tar files there, but 1 compressed ones .a.tar.gz, ....*--data.stream_samples"
    ):
        index_shards(tmp_path, workers=1)


def test_leftovers_of_macos_and_names_that_forge_a_line_do_no_harm(tmp_path: Path, capsys) -> None:
    write_tar(tmp_path / "a.tar", {
        "a.png": png(1), "._a.png": b"junk", "__MACOSX/a.png": b"junk", "b\nsslvit: done.png": b"nonsense",
        "\x1b[2Jc.png": b"nonsense",
    })  # fmt: skip
    index = index_shards(tmp_path, workers=1)
    assert numbers_of(index) == [1]
    assert len(index.skipped) == 4
    text = capsys.readouterr().out + describe_shards(index)
    assert "\x1b" not in text
    assert "\nsslvit: done" not in text


def test_shards_of_others_keep_their_pixels_as_stored_if_asked(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    write_tar(tmp_path / "a.tar", {"a.png": encoded(Image.new("L", (8, 4), 9), "PNG", exif=exif)})
    assert index_shards(tmp_path).image_size == [8, 4]
    stored = index_shards(tmp_path, options=IndexOptions(orientation="stored"))
    assert (stored.image_size, load_index(tmp_path).orientation) == ([4, 8], "stored")
    assert index_shards(tmp_path).orientation == "stored"  # what was chosen once stays
    assert check_shards(stored).is_whole
