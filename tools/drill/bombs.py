"""Small files that promise, or unpack to, gigabytes; each in a folder, with the commands that meet it."""

from __future__ import annotations

import gzip
import io
import json
import random
import struct
import tarfile
import zipfile
import zlib
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from shard_fixtures import encoded, photograph

HUGE = 30_000  # side of an image
ZEROS = 1 << 30  # bytes that a compressed file unpacks to
PACK = ["--workers", "1"]


def pack_and_embed(work: Path, files: dict[str, bytes]) -> list[list]:
    """An image folder with these files beside a good one, and a shard of them."""
    folder = work / "photos" / "cat"
    folder.mkdir(parents=True)
    (folder / "good.png").write_bytes(encoded(photograph(8, 8), "PNG"))
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (work / "theirs").mkdir()
    good = (folder / "good.png").read_bytes()
    (work / "theirs" / "shard.tar").write_bytes(tar_of(["good.png", *files], [good, *files.values()]))
    return [
        ["shards", "pack", "photos", "packed", *PACK], ["shards", "pack", "photos", "small", "--resize", "8", *PACK],
        ["shards", "index", "theirs", *PACK], ["embed", "own", "theirs", "-o", "features.npz"],
    ]  # fmt: skip


def flat_images(work: Path, rng: random.Random) -> list[list]:
    """One color, so that 10,000 x 10,000 pixels are a few kilobytes: what each format compresses best."""
    side = 9_900
    kinds = [
        ("PNG", "1", {}), ("PNG", "L", {"optimize": True}), ("GIF", "L", {}), ("JPEG", "L", {"quality": 1}),
        ("TIFF", "1", {"compression": "group4"}), ("TIFF", "L", {"compression": "tiff_lzw"}),
        ("WEBP", "RGB", {"lossless": True}),
    ]  # fmt: skip
    kind, mode, options = rng.choice(kinds)
    return pack_and_embed(work, {f"flat.{kind.lower()}": encoded(Image.new(mode, (side, side)), kind, **options)})


def promised_sizes(work: Path, rng: random.Random) -> list[list]:
    """Headers alone that promise gigapixels."""
    header = struct.pack(">IIBBBBB", HUGE, HUGE, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")
    jpeg = bytearray(encoded(photograph(16, 16), "JPEG"))
    place = jpeg.index(b"\xff\xc0") + 5
    jpeg[place : place + 4] = struct.pack(">HH", 65_500, 65_500)
    gif = bytearray(encoded(photograph(16, 16).convert("P"), "GIF"))
    gif[6:10] = struct.pack("<HH", 65_535, 65_535)
    bmp = bytearray(encoded(photograph(16, 16), "BMP"))
    bmp[18:26] = struct.pack("<ii", 2**31 - 1, 2**31 - 1)
    shape = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({HUGE}, {HUGE}, 3), }}"
    array = b"\x93NUMPY\x01\x00v\x00" + shape.ljust(117).encode() + b"\n"
    files = {"a.png": png, "b.jpg": bytes(jpeg), "c.gif": bytes(gif), "d.bmp": bytes(bmp), "e.npy": array,
             "f.ppm": b"P6 60000 60000 255\n", "g.pgm": b"P5 99999 99999 65535\n"}  # fmt: skip
    return pack_and_embed(work, files)


def progressive_scans(work: Path, rng: random.Random) -> list[list]:
    """A progressive JPEG of a large image whose scans are repeated thousands of times."""
    content = encoded(Image.new("L", (4000, 4000), 128), "JPEG", progressive=True, quality=1)
    first = content.index(b"\xff\xda")
    return pack_and_embed(work, {"scans.jpg": content[:-2] + content[first:-2] * 300 + b"\xff\xd9"})


def text_chunks(work: Path, rng: random.Random) -> list[list]:
    """A PNG whose text, or whose color profile, unpacks to a gigabyte."""
    image = encoded(photograph(8, 8), "PNG")
    zeros = squeezed()
    kind = rng.choice((b"zTXt", b"iCCP", b"iTXt"))
    body = b"a\0\x01\0\0\0" + zeros if kind == b"iTXt" else b"a\0\0" + zeros
    return pack_and_embed(work, {"text.png": image[:33] + chunk(kind, body) + image[33:]})


def many_frames(work: Path, rng: random.Random) -> list[list]:
    """A GIF of ten thousand frames, and a TIFF whose directories form a ring."""
    gif = encoded(photograph(8, 8).convert("P"), "GIF")
    start = gif.index(b",")
    frames = gif[:-1] + gif[start:-1] * 10_000 + b";"
    tiff = bytearray(encoded(photograph(8, 8), "TIFF"))
    where = struct.unpack("<I", tiff[4:8])[0]
    count = struct.unpack("<H", tiff[where : where + 2])[0]
    tiff[where + 2 + 12 * count :][:4] = struct.pack("<I", where)
    return pack_and_embed(work, {"frames.gif": frames, "ring.tif": bytes(tiff)})


def zipped_arrays(work: Path, rng: random.Random) -> list[list]:
    """An .npz of a megabyte with a gigabyte of zeros in it, as images and as weights."""
    (work / "set.npz").write_bytes(zipped_zeros())
    lies = io.BytesIO()
    np.lib.format.write_array_header_1_0(lies, {"descr": "<f8", "fortran_order": False, "shape": (1 << 40,)})
    with zipfile.ZipFile(work / "weights.npz", "w") as file:
        file.writestr("wte.npy", lies.getvalue())
    return [["shards", "pack", "set.npz", "packed", *PACK], ["import", "weights.npz", "out"]]


def zipped_idx(work: Path, rng: random.Random) -> list[list]:
    """A gzipped IDX file whose header promises little, and which goes on for a gigabyte; and one that promises all."""
    little, all_of_it = (struct.pack(">HBBIII", 0, 8, 3, count, 28, 28) for count in (10, 2**31 - 1))
    (work / "a-images-idx3-ubyte.gz").write_bytes(squeezed(little, 31))
    (work / "b-images-idx3-ubyte.gz").write_bytes(gzip.compress(all_of_it + bytes(5000)))
    return [["shards", "pack", f"{name}-images-idx3-ubyte.gz", f"packed-{name}", *PACK] for name in "ab"]


def networks(work: Path, rng: random.Random) -> list[list]:
    """An encoder.json of 800 bytes that describes any network."""
    file = work / "own" / "encoder.json"
    about = json.loads(file.read_text())
    about["encoder"] |= rng.choice((
        {"depth": 10_000_000}, {"width": 1 << 20, "heads": 1}, {"image_size": [1 << 20, 1 << 20]},
        {"registers": 1 << 30}, {"mlp_ratio": 1e9}, {"depth": 4000, "width": 8192, "heads": 8},
    ))  # fmt: skip
    file.write_text(json.dumps(about))
    return [
        ["import", "own", "out"],
        ["probe", "own", "--train", "shards", "--val", "shards", "--allow-same-data", "--cache", "none"],
    ]


def long_headers(work: Path, rng: random.Random) -> list[list]:
    """Weights whose header says that it is longer than the file, or describes tensors that are."""
    file = work / "own" / "encoder.safetensors"
    header = json.dumps({"pos_embed": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    file.write_bytes(rng.choice((struct.pack("<Q", 1 << 40) + b"{}", struct.pack("<Q", len(header)) + header)))
    return [["import", "own", "out"]]


def deep_settings(work: Path, rng: random.Random) -> list[list]:
    """YAML that is short and unfolds, and JSON deeper than a parser goes."""
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x]"]
    lines += [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    (work / "recipe.yaml").write_text("\n".join(lines) + "\nencoder: {palette: *a8}\n")
    (work / "own" / "encoder.json").write_text('{"encoder": ' + "[" * 100_000)
    return [["pretrain", "--config", "recipe.yaml", "--data", "shards", "--out", "out"],
            ["bench", "recipe.yaml", "--out", "out"], ["import", "own", "out"]]  # fmt: skip


def labels(work: Path, rng: random.Random) -> list[list]:
    """Class numbers near 2^31 in another's tar, and in a list."""
    (work / "theirs").mkdir()
    names = ["a.png", "a.cls", "b.png", "b.cls"]
    image = encoded(photograph(8, 8), "PNG")
    (work / "theirs" / "shard.tar").write_bytes(tar_of(names, [image, b"2147483647", image, b"0"]))
    (work / "a.png").write_bytes(image)
    (work / "list.csv").write_text("path,label\na.png,2000000000\n")
    return [["shards", "index", "theirs", *PACK], ["shards", "info", "theirs"],
            ["shards", "pack", "list.csv", "packed", *PACK]]  # fmt: skip


BOMBS = {
    bomb.__name__: bomb
    for bomb in (
        flat_images, promised_sizes, progressive_scans, text_chunks, many_frames, zipped_arrays, zipped_idx, networks,
        long_headers, deep_settings, labels,
    )
}  # fmt: skip


def chunk(kind: bytes, body: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


@cache  # it takes seconds
def squeezed(head: bytes = b"", wbits: int = zlib.MAX_WBITS) -> bytes:
    """A gigabyte of zeros, compressed."""
    packer = zlib.compressobj(1, wbits=wbits)
    pieces = [packer.compress(head)]
    pieces += [packer.compress(bytes(1 << 20)) for _ in range(ZEROS >> 20)]
    return b"".join([*pieces, packer.flush()])


@cache
def zipped_zeros() -> bytes:
    """An .npz of an array with a gigabyte of zeros."""
    header, whole = io.BytesIO(), io.BytesIO()
    shape = (ZEROS >> 14, 128, 128)
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    with (
        zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file,
        file.open("images.npy", "w", force_zip64=True) as member,
    ):
        member.write(header.getvalue())
        for _ in range(ZEROS >> 20):
            member.write(bytes(1 << 20))
    return whole.getvalue()


def tar_of(names: list[str], contents: list[bytes] | None = None, link_to: str | None = None) -> bytes:
    image = encoded(photograph(8, 8), "PNG")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", errors="surrogateescape") as tar:
        for name, content in zip(names, contents or [image] * len(names), strict=True):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) if link_to else ():
            member = tarfile.TarInfo(f"link{kind.decode()}.png")
            member.type, member.linkname = kind, link_to
            tar.addfile(member)
    return buffer.getvalue()
