"""Shards of others are read and ours are read by others; what is damaged or dangerous is named."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from shard_fixtures import encoded, image_folder, numbered_shards, numbers_of, photograph, png

from sslvit.cli import main
from sslvit.data.decode import decode
from sslvit.data.index import load_index
from sslvit.data.inspect import check_shards, describe_shards
from sslvit.data.loader import make_batch
from sslvit.data.open import open_shards
from sslvit.data.pack import pack_source
from sslvit.data.plan import EpochPlan
from sslvit.data.reader import ShardReader
from sslvit.data.records import RECORD
from sslvit.data.remote import ShardCache
from sslvit.data.scan import index_shards
from sslvit.data.views import Views
from sslvit.files import WriteError
from sslvit.settings.views import CenterSettings


def test_webdataset_reads_our_shards(tmp_path: Path) -> None:
    import webdataset

    (index,) = pack_source(image_folder(tmp_path / "in"), tmp_path / "out")
    found = webdataset.WebDataset(str(tmp_path / "out" / index.shards[0].name), shardshuffle=False).to_tuple(
        "png", "cls"
    )
    labels = {decode(png)[:2, 0, 0].numpy().tobytes(): int(cls) for png, cls in found}
    assert len(labels) == 20
    assert all(key[0] == label for key, label in labels.items())


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
    assert "at a global batch of 24: 1 step per epoch, each dropping 6 images" in text
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
    monkeypatch.setattr("sslvit.data.records.sha256_of", lambda path: pytest.fail("a checksum reads the whole file"))
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

    writers = {"numpy.lib.format.write_array_header_1_0": "index.npy", "pathlib.Path.write_bytes": "_info.json"}
    for where, name in writers.items():
        index.encoding = "something else"
        with monkeypatch.context() as patch:
            patch.setattr(where, full)
            with pytest.raises(WriteError, match=f"/{name}: could not be written .No space left.*Make room"):
                index.save()
        assert load_index(tmp_path).encoding == ""
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
