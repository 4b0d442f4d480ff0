"""Arrays, IDX files and data set objects become images and labels."""

from __future__ import annotations

import gzip
import io
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shard_fixtures import contents, image_folder, numbers_of

from sslvit.data.any_source import SourceOptions, read_source
from sslvit.data.array_images import array_samples
from sslvit.data.dataset_source import dataset_source
from sslvit.data.decode import decode_pixels
from sslvit.data.header import read_header
from sslvit.data.pack import pack, pack_source
from sslvit.data.reader import ShardReader


def test_arrays_and_idx_files_are_packed(tmp_path: Path) -> None:
    images = np.repeat(np.arange(12, dtype=np.uint8), 36).reshape(12, 6, 6)
    labels = np.arange(12) % 3
    np.save(tmp_path / "a.npy", images)
    np.savez(tmp_path / "b.npz", x=images, y=labels)
    header = struct.pack(">HBB", 0, 8, 3) + struct.pack(">III", 12, 6, 6)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(header + images.tobytes())
    label_file = struct.pack(">HBBI", 0, 8, 1, 12) + labels.astype(np.uint8).tobytes()
    with gzip.open(tmp_path / "t10k-images-idx3-ubyte.gz", "wb") as file:
        file.write(header + images.tobytes())
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(label_file)
    for name, has_labels in [
        ("a.npy", False), ("b.npz", True), ("train-images-idx3-ubyte", True), ("t10k-images-idx3-ubyte.gz", False),
    ]:  # fmt: skip
        (index,) = pack_source(tmp_path / name, tmp_path / f"out-{name}")
        numbers = numbers_of(index)
        assert sorted(numbers) == list(range(12))
        assert (index.classes is not None) == has_labels
        if has_labels:
            assert index.labels_of(slice(None)).tolist() == [number % 3 for number in numbers]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npy", np.zeros((3, 5, 5), np.float32), "from 0 to 0, and images are uint8 or uint16.*--convert unit"),
        ("a.npy", np.zeros((3, 4), np.uint8), "expected one array of images"),
        ("a.npy", np.array([{}], object), "it holds Python objects, and loading those could run code"),
        ("a.npy", b"nonsense", "not a readable array"),
        ("x-idx3-ubyte", b"nonsense", "not an IDX file"),
        (
            "x-idx3-ubyte",
            struct.pack(">HBBIII", 0, 8, 3, 9, 9, 9),
            "12 bytes, but its header says|16 bytes, but its header says",
        ),
    ],
)
def test_wrong_arrays_are_refused(tmp_path: Path, name: str, content, message: str) -> None:
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        np.save(tmp_path / name, content, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        pack_source(tmp_path / name, tmp_path / "out")


def test_a_torchvision_data_set_object_is_packed(tmp_path: Path) -> None:
    from torchvision.datasets import FakeData, ImageFolder

    found = dataset_source(ImageFolder(str(image_folder(tmp_path / "in"))))
    index = pack(found.samples, tmp_path / "out", found.classes)
    assert contents(index) == {(label, i): label for label in range(2) for i in range(10)}
    assert index.classes == ["cat", "dog"]
    with pytest.raises(ValueError, match=r"none of the 1 samples .* an array of float64 and shape \(3,\)"):
        dataset_source([np.zeros(3)])
    fake = dataset_source(FakeData(4, (3, 8, 8), 2))
    assert len(pack(fake.samples, tmp_path / "fake", fake.classes)) == 4


@pytest.mark.parametrize("kind", ["n 1", "bool", "float", "text", "bytes"])
def test_labels_of_an_npz_are_read_in_every_form_that_people_store(tmp_path: Path, kind: str, capsys) -> None:
    images = np.repeat(np.arange(12, dtype=np.uint8), 3 * 36).reshape(12, 6, 6, 3)
    numbers = np.arange(12) % 2
    labels = {
        "n 1": numbers[:, None], "bool": numbers.astype(bool), "float": numbers.astype(np.float32),
        "text": np.array(["cat", "dog"])[numbers], "bytes": np.array([b"cat", b"dog"])[numbers],
    }[kind]  # fmt: skip
    np.savez(tmp_path / "a.npz", x_train=images, y_train=labels, other=np.zeros(5))
    (index,) = pack_source(tmp_path / "a.npz", tmp_path / "out", workers=1)
    names = {"bool": ["false", "true"], "text": ["cat", "dog"], "bytes": ["cat", "dog"]}.get(kind, ["0", "1"])
    assert index.classes == names
    assert index.labels_of(slice(None)).tolist() == [number % 2 for number in numbers_of(index)]
    said = capsys.readouterr().out
    assert "labels: y_train" in said
    assert "arrays that are not used: other" in said


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (np.eye(3)[[0, 1, 2, 0]], "y is not used for labels: 3 values for each image"),
        (np.array([0.5, 1, 2, 3]), "y is not used for labels: float64 numbers that are not whole"),
        (np.array([1, 2, 3, 4_750_000]), "y is not used for labels: labels up to 4750000 for 4 images"),
        (np.array([-3, -1, 1, 2]), "y is not used for labels: a label of -3; classes count from 0"),
        (
            np.array([-1, 0, 1, -1]),
            "y is not used for labels: 2 of 4 labels are -1, which marks images without a class",
        ),
    ],
)
def test_what_could_be_labels_and_is_not_used_is_said(tmp_path: Path, labels: np.ndarray, said: str, capsys) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((4, 6, 6), np.uint8), y=labels)
    (index,) = pack_source(tmp_path / "a.npz", tmp_path / "out", workers=1)
    assert index.classes is None
    assert said in capsys.readouterr().out
    with pytest.raises(ValueError, match="--labels y: "):
        pack_source(tmp_path / "a.npz", tmp_path / "again", options=SourceOptions(labels="y"))


def test_arrays_and_labels_of_an_npz_are_chosen_by_name(tmp_path: Path) -> None:
    arrays = {"a": np.full((4, 6, 6), 1, np.uint8), "b": np.full((4, 6, 6), 2, np.uint8)}
    np.savez(tmp_path / "a.npz", **arrays, p=np.arange(4), q=np.arange(4)[::-1])
    with pytest.raises(ValueError, match=r"expected one array of images, found a \(4, 6, 6\).*Choose: --images a"):
        read_source(tmp_path / "a.npz")
    found = read_source(tmp_path / "a.npz", SourceOptions(images="b"))
    assert (found.classes, found.notes) == (None, ["arrays that are not used: a, p, q (for labels: --labels a)"])
    found = read_source(tmp_path / "a.npz", SourceOptions(images="b", labels="q"))
    assert [sample.label for sample in found.samples] == [3, 2, 1, 0]
    np.save(tmp_path / "labels.npy", np.array([0, 0, 1, 1]))
    beside = SourceOptions(images="a", labels=str(tmp_path / "labels.npy"))
    assert [sample.label for sample in read_source(tmp_path / "a.npz", beside).samples] == [0, 0, 1, 1]
    for options, message in [
        ({"images": "z"}, "--images z: not in .*a.npz .it holds a, b"),
        ({"images": "a", "labels": "z"}, "--labels z: neither an array of"),
        ({"label_column": "y"}, "--label-column y: .*a.npz is an array. Omit the option"),
        ({"layout": "hwc"}, "--layout: 'hwc' is not one of nhw, nhwc, nchw"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_source(tmp_path / "a.npz", SourceOptions(**options))


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((5, 3, 40, 40), "nchw"), ((5, 1, 28, 28), "nchw"), ((5, 40, 30, 3), "nhwc"), ((5, 28, 28, 1), "nhwc"),
        ((5, 13, 40, 50), "nchw"), ((5, 40, 50, 13), "nhwc"), ((5, 4, 30, 4), None), ((5, 3, 3, 3), None),
        ((5, 40, 40, 40), None),
    ],
)  # fmt: skip
def test_the_layout_of_an_array_is_seen_or_asked_for(tmp_path: Path, shape: tuple, layout: str | None) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    np.save(tmp_path / "a.npy", array)
    if layout is None:
        with pytest.raises(ValueError, match="could be 'n h w c' or 'n c h w'. Choose one: --layout nhwc"):
            read_source(tmp_path / "a.npy")
    for name in [layout] if layout else ["nhwc", "nchw"]:
        found = read_source(tmp_path / "a.npy", SourceOptions(layout=None if layout else name))
        image = array[2] if name == "nhwc" else array[2].transpose(1, 2, 0)
        header = read_header(found.samples[2].read())
        assert (header.height, header.width, header.channels) == image.shape
        assert np.array_equal(decode_pixels(found.samples[2].read(), image.shape[2]), image)
        assert ("'n c h w'" in " ".join(found.notes)) == (layout == "nchw")


def test_one_image_is_not_taken_for_many_rows(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((40, 30, 3), np.uint8))
    with pytest.raises(ValueError, match="that of one image 'h w c'"):
        read_source(tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("array", "convert", "pixels"),
    [
        (np.array([0.0, 0.5, 1.0]), "unit", [0, 128, 255]),
        (np.array([-1.0, 0.0, 1.0]), "signed", [0, 128, 255]),
        (np.array([0, 100, 255], np.int64), "byte", [0, 100, 255]),
        (np.array([False, True, True]), "unit", [0, 255, 255]),
        (np.array([0, 1000, 65535], np.int32), "deep", [0, 1000, 65535]),
    ],
)
def test_values_that_are_no_pixels_are_converted_by_name(
    tmp_path: Path, array: np.ndarray, convert: str, pixels: list[int]
) -> None:
    np.save(tmp_path / "a.npy", np.broadcast_to(array[None, :, None], (5, 3, 8)))
    with pytest.raises(ValueError, match=rf"images are uint8 or uint16. Choose a conversion: .*--convert {convert}"):
        read_source(tmp_path / "a.npy")
    found = read_source(tmp_path / "a.npy", SourceOptions(convert=convert))
    bits = 16 if convert == "deep" else 8
    image = decode_pixels(found.samples[4].read(), 1, bits)[:, 0, 0]
    assert (image * (257 if bits == 16 else 1)).round().astype(int).tolist() == pixels


def test_a_value_outside_the_named_range_is_left_out_and_named(tmp_path: Path) -> None:
    array = np.zeros((3, 8, 8), np.float32)
    array[1] = 1.5
    np.save(tmp_path / "a.npy", array)
    (index,) = pack_source(tmp_path / "a.npy", tmp_path / "out", options=SourceOptions(convert="unit"), workers=1)
    assert index.skipped == {"000001.png": "values outside 0 to 1, which --convert unit takes"}


def test_arrays_that_promise_more_than_they_hold_are_refused_before_they_are_unpacked(tmp_path: Path) -> None:
    header = struct.pack(">HBBIII", 0, 8, 3, 60_000, 1000, 1000)
    with gzip.open(tmp_path / "x-images-idx3-ubyte.gz", "wb") as file:
        file.write(header)
    with pytest.raises(ValueError, match=r"bytes, but its header says \(60000, 1000, 1000\)"):
        read_source(tmp_path / "x-images-idx3-ubyte.gz")
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": (10**6, 999, 999)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", buffer.getvalue())
    with pytest.raises(ValueError, match="x.npy is shorter than it says"):
        read_source(tmp_path / "a.npz")
    (tmp_path / "a.npy").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="it is shorter than it says"):
        read_source(tmp_path / "a.npy")


def test_gzipped_idx_images_find_plain_labels(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "train-images-idx3-ubyte.gz", "wb") as file:
        file.write(struct.pack(">HBBIII", 0, 8, 3, 4, 6, 6) + bytes(4 * 36))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(struct.pack(">HBBI", 0, 8, 1, 4) + bytes([0, 1, 1, 0]))
    found = read_source(tmp_path / "train-images-idx3-ubyte.gz")
    assert [sample.label for sample in found.samples] == [0, 1, 1, 0]


class Labeled:
    """A data set object of torchvision's kind."""

    def __init__(self, labels: list[int]) -> None:
        self.labels, self.classes = np.array(labels), ["airplane", "bird", "car"]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int):
        return Image.new("L", (4, 4), number), int(self.labels[number])


@pytest.mark.parametrize(("labels", "said"), [([-1] * 4, "4 of 4"), ([-1, 0, 2, 1], "1 of 4")])
def test_labels_of_minus_one_are_no_labels_wherever_they_stand(tmp_path: Path, labels: list[int], said: str) -> None:
    """STL-10 marks its images without a class so."""
    words = f"{said} labels are -1, which marks images without a class"
    (tmp_path / "in").mkdir()
    for number in range(4):
        Image.new("L", (4, 4), number).save(tmp_path / "in" / f"{number}.png")
    lines = "".join(f"in/{number}.png,{label}\n" for number, label in enumerate(labels))
    (tmp_path / "a.csv").write_text(f"path,label\n{lines}")
    images = np.repeat(np.arange(4, dtype=np.uint8), 16).reshape(4, 4, 4)
    np.savez(tmp_path / "a.npz", x=images, y=np.array(labels))
    found = {
        "object": dataset_source(Labeled(labels)),
        "list": read_source(tmp_path / "a.csv"),
        "array": read_source(tmp_path / "a.npz"),
    }
    for name, source in found.items():
        assert source.classes is None, name
        assert words in " ".join(source.notes), name
        index = pack(source.samples, tmp_path / name, source.classes, workers=1)
        assert sorted(numbers_of(index)) == [0, 1, 2, 3]
        with pytest.raises(ValueError, match="these images have no labels"):
            index.labels_of(slice(None))
    with pytest.raises(ValueError, match=f"--labels y: {words}.*Leave it out to pack them without labels"):
        read_source(tmp_path / "a.npz", SourceOptions(labels="y"))
    with pytest.raises(ValueError, match=f"{said[0]} of 4 samples have no label, and there are 3 classes"):
        pack(array_samples(images, labels), tmp_path / "direct", ["a", "b", "c"])
    assert dataset_source(Labeled([2, 0, 1, 1])).classes == ["airplane", "bird", "car"]


def test_integers_of_32_bits_are_refused_where_16_cannot_hold_them(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, low, high in (("fits", 0, 65_535), ("large", 0, 65_536), ("negative", -1, 5)):
        pixels = np.full((6, 6), low, np.int32)
        pixels[2:] = high
        Image.fromarray(pixels).save(tmp_path / "in" / f"{name}.tif")
    (index,) = pack_source(tmp_path / "in", tmp_path / "out", workers=1)
    assert [index.key(i) for i in range(len(index))] == ["shard-000000.tar/fits.tif"]
    assert index.skipped["large.tif"].startswith(
        "32-bit integers from 0 to 65536; images have 8 or 16 bits: scale them"
    )
    assert index.skipped["negative.tif"].startswith("32-bit integers from -1 to 5; images have 8 or 16 bits")
    deep = decode_pixels(ShardReader(index, 1).read(0), 1, 16)
    assert (deep.min(), deep.max()) == (0, 255)
