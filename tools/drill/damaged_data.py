"""Damaged shards and their indexes, and damaged things to pack."""

from __future__ import annotations

import gzip
import io
import json
import random
import shutil
import struct
import tarfile
from pathlib import Path

import numpy as np
from children import command, in_child
from kill import pack_words
from material import Workshop
from mutations import damage_bytes, damage_json, damage_values
from shard_fixtures import encoded, photograph
from targets import Payload, Reader, Shared, Target, copied, npy, one_file, prepare_shards

from sslvit.data.any_source import read_source
from sslvit.data.index import load_index
from sslvit.data.inspect import describe_shards
from sslvit.data.records import RECORD, sha256_of
from sslvit.data.scan import scan_shard
from sslvit.data.unfinished import finish_packing
from sslvit.settings.palette import read_palette


def open_index(folder: Path) -> Reader:
    shards = copied("shards", folder)
    about, records = (shards / "index.json").read_bytes(), np.load(shards / "index.npy")

    def read(content: bytes, array: bytes | None) -> None:
        (shards / "index.npy").write_bytes(npy(records) if array is None else array)
        (shards / "index.json").write_bytes(content)
        index = load_index(shards)
        describe_shards(index)
        index.missing_shards(), index.fingerprint(), index.key(0)
        for sample in range(0, len(index), 7):
            index.locate(sample)

    def damaged(rng: random.Random) -> Payload:
        if rng.random() < 0.6:
            return damage_json(about, rng), None
        if rng.random() < 0.5:
            changed = records.copy()
            name = rng.choice(RECORD.names)
            limits = np.iinfo(changed.dtype[name])
            changed[name][rng.randrange(len(changed))] = rng.choice(
                (limits.min, limits.max, -1 if limits.min else 0, 2**20)
            )
            array = npy(changed)
        else:
            array = damage_bytes(npy(records), rng)
        (shards / "index.npy").write_bytes(array)  # and the description agrees, as an attacker's would
        return json.dumps(json.loads(about) | {"records_sha256": sha256_of(shards / "index.npy")}).encode(), array

    return Reader(read, damaged, lambda: (about, None), "shards")


def prepare_packing(workshop: Workshop) -> None:
    out = workshop.folder / "unfinished"
    if not out.exists():
        for part in ("1/2", "2/2"):
            in_child(command(*pack_words(workshop, out), "--part", part), workshop.log)
    Shared.folders["unfinished"] = out


def open_packing(folder: Path) -> Reader:
    whole = copied("unfinished", folder)
    files = sorted(path.name for path in (whole / "packing").iterdir() if path.suffix in (".json", ".npy"))
    contents = {name: (whole / "packing" / name).read_bytes() for name in files}
    shards = {path.name: path.read_bytes() for path in (whole / "packing").glob("*.tar")}
    out = folder / "out"

    def read(name: str, content: bytes) -> None:
        shutil.rmtree(out, ignore_errors=True)
        (out / "packing").mkdir(parents=True)
        for other, value in (contents | shards | {name: content}).items():
            (out / "packing" / other).write_bytes(value)
        finish_packing(out)

    def damaged(rng: random.Random) -> Payload:
        name = rng.choice(files)
        return name, (damage_json if name.endswith(".json") else damage_bytes)(contents[name], rng)

    return Reader(read, damaged, lambda: (files[0], contents[files[0]]), "out")


def open_tars(folder: Path) -> Reader:
    shard = next(iter(sorted(copied("shards", folder).glob("*.tar")))).read_bytes()
    return one_file(folder, "shard.tar", [shard[:12 * 512] + bytes(1024), *made_tars()], damage_bytes,
                    lambda path: scan_shard(path))  # fmt: skip


def made_tars() -> list[bytes]:
    """With long names, extended headers, links and holes."""
    image, found = encoded(photograph(8, 8), "PNG"), []
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
            for name in ("a.png", "dir/b.png", ("long/" * 18) + "c.png", "d.left.png"):
                member = tarfile.TarInfo(name)
                member.size = len(image)
                tar.addfile(member, io.BytesIO(image))
            label = tarfile.TarInfo("a.cls")
            label.size = 1
            tar.addfile(label, io.BytesIO(b"3"))
            for link, target in ((tarfile.LNKTYPE, "a.png"), (tarfile.SYMTYPE, "../../a.png")):
                member = tarfile.TarInfo(f"link{link.decode()}.png")
                member.type, member.linkname = link, target
                tar.addfile(member)
        found.append(buffer.getvalue())
    return found


def read_and_open(path: Path) -> None:
    for sample in read_source(path).samples[:3]:
        sample.read()


def open_idx(folder: Path) -> Reader:
    images = struct.pack(">HBBIII", 0, 8, 3, 5, 6, 7) + bytes(5 * 6 * 7)
    (folder / "train-labels-idx1-ubyte").write_bytes(struct.pack(">HBBI", 0, 8, 1, 5) + bytes(range(5)))
    plain = one_file(folder, "train-images-idx3-ubyte", [images], damage_bytes, read_and_open)
    packed = one_file(folder, "train-images-idx3-ubyte.gz", [gzip.compress(images)], damage_bytes, read_and_open)
    return Reader(
        lambda content, is_packed: (packed if is_packed else plain).read(content),
        lambda rng: (*(packed if (zipped := rng.random() < 0.4) else plain).damaged(rng), zipped),
        lambda: (images, False), "-ubyte",  # of the images or of the labels
    )  # fmt: skip


def open_arrays(folder: Path) -> Reader:
    buffer, packed = io.BytesIO(), io.BytesIO()
    content = {"images": np.zeros((6, 8, 8, 3), np.uint8), "labels": np.arange(6)}
    np.savez(buffer, **content), np.savez_compressed(packed, **content)
    zipped = one_file(folder, "set.npz", [buffer.getvalue(), packed.getvalue()], damage_bytes, read_and_open)
    single = one_file(folder, "set.npy", [npy(content["images"]), npy(np.zeros((4, 8, 8), np.uint16))], damage_bytes,
                      read_and_open)  # fmt: skip
    return Reader(
        lambda content, is_zip: (zipped if is_zip else single).read(content),
        lambda rng: (*(zipped if (is_zip := rng.random() < 0.6) else single).damaged(rng), is_zip),
        lambda: (buffer.getvalue(), True), "set.np",
    )  # fmt: skip


def open_lists(folder: Path) -> Reader:
    for number in range(4):
        (folder / f"{number}.png").write_bytes(encoded(photograph(8, 8, number), "PNG"))
    rows = [{"path": f"{number}.png", "label": ("cat", "dog")[number % 2]} for number in range(4)]
    commas = ("path,label\n" + "".join(f"{row['path']},{row['label']}\n" for row in rows)).encode()
    contents = {".csv": commas, ".tsv": commas.replace(b",", b"\t"),
                ".jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode()}  # fmt: skip

    def read(suffix: str, content: bytes) -> None:
        path = folder / f"list{suffix}"
        path.write_bytes(content)
        read_and_open(path)

    def damaged(rng: random.Random) -> Payload:
        suffix = rng.choice(list(contents))
        if suffix == ".jsonl" and rng.random() < 0.6:
            return suffix, "".join(json.dumps(row) + "\n" for row in damage_values(rows, rng) or [0]).encode()
        return suffix, damage_bytes(contents[suffix], rng)

    return Reader(read, damaged, lambda: (".csv", contents[".csv"]), "list.")


def open_palettes(folder: Path) -> Reader:
    colors = [[round(value / 4 - 1, 3), 0.0, 0.5] for value in range(8)]
    ours, theirs = json.dumps({"colors": colors}).encode(), json.dumps({"clusters": colors}).encode()
    array = npy(np.array(colors, np.float32))
    text = one_file(folder, "palette.json", [ours, theirs], damage_json, read_palette)
    binary = one_file(folder, "palette.npy", [array], damage_bytes, read_palette)
    return Reader(
        lambda content, is_text: (text if is_text else binary).read(content),
        lambda rng: (*(text if (is_text := rng.random() < 0.6) else binary).damaged(rng), is_text),
        lambda: (ours, True), "palette.",
    )  # fmt: skip


TARGETS = {
    "index": Target("index.json and index.npy", open_index, prepare_shards),
    "packing": Target("reports of a packing", open_packing, prepare_packing),
    "tar": Target("tar files", open_tars, prepare_shards),
    "idx": Target("IDX files, gzipped too", open_idx),
    "npz": Target("arrays to pack", open_arrays),
    "list": Target("lists to pack (csv, tsv, jsonl)", open_lists),
    "palette": Target("palettes", open_palettes),
}
