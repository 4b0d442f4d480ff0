"""Data sets that are packed: objects, those of torchvision by name, and those of Hugging Face."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from shard_fixtures import encoded, numbers_of, photograph

import sslvit
from sslvit.cli import main
from sslvit.data.index import load_index
from sslvit.data.python_data import python_index
from sslvit.data.reader import ShardReader


class Gray:
    """Gray images, each pixel its number, made by `make`."""

    def __init__(self, count: int, make: Callable[[int], Any]) -> None:
        self.count, self.make = count, make

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, item: int) -> Any:
        return self.make(item)


def gray(number: int) -> Image.Image:
    return Image.new("L", (4, 4), number)


def packed(source: Any, folder: Path, **options: Any) -> Any:
    (index,) = sslvit.pack(source, folder, workers=1, **options).indices
    return index


def suffixes(index: Any) -> set[str]:
    return {Path(index.key(sample)).suffix for sample in range(len(index))}


# ---- objects -------------------------------------------------------------------------------------------------


def test_a_data_set_object_is_packed_without_loss(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3)).astype(np.uint8)
    tensors = torch.utils.data.TensorDataset(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.arange(5) % 2)
    index = packed(tensors, tmp_path / "t")
    assert (index.classes, suffixes(index), index.image_size) == (["0", "1"], {".png"}, [6, 7])
    reader = ShardReader(index)
    order = [int(Path(index.key(sample)).stem) for sample in range(5)]
    assert torch.equal(reader.decoded, torch.from_numpy(pixels[order]).permute(0, 3, 1, 2))
    assert index.labels_of(slice(None)).tolist() == [number % 2 for number in order]


def test_files_of_a_data_set_go_in_as_they_are_and_are_called_by_their_format(tmp_path: Path) -> None:
    files = [
        encoded(photograph(20, 30, n), kind) for n, kind in enumerate(["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
    ]
    index = packed([{"image": {"bytes": file, "path": None}} for file in files], tmp_path)
    assert suffixes(index) == {".jpg", ".png", ".webp", ".gif", ".tif", ".bmp"}
    reader = ShardReader(index, memory_limit_mb=0)
    assert {reader.read(sample) for sample in range(len(files))} == set(files)


def test_samples_that_cannot_be_made_are_skipped_by_name(tmp_path: Path) -> None:
    def make(item: int) -> Any:
        if item == 2:
            raise OSError("the scanner was off")
        return gray(item), item % 2

    index = packed(Gray(5, make), tmp_path)
    assert sorted(numbers_of(index)) == [0, 1, 3, 4]
    assert index.skipped == {"000002": "OSError: the scanner was off"}


def test_labels_that_are_no_classes_are_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    index = packed(Gray(4, lambda item: (gray(item), item + 0.5)), tmp_path)
    assert index.classes is None
    assert "Gray: labels are not used: float64 numbers that are not whole" in capsys.readouterr().out


# ---- torchvision ---------------------------------------------------------------------------------------------


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with three images of CIFAR-100's training and two of its test, whose checksums are taken for right."""
    from torchvision.datasets import CIFAR100

    folder = tmp_path / "files" / "cifar-100-python"
    folder.mkdir(parents=True)
    for name, count in (("train", 3), ("test", 2)):
        data = np.repeat(np.arange(count, dtype=np.uint8), 3072).reshape(count, 3072)
        (folder / name).write_bytes(pickle.dumps({"data": data, "fine_labels": [1, 0, 1][:count]}))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": ["apple", "bear"]}))
    monkeypatch.setattr(CIFAR100, "_check_integrity", lambda self: (Path(self.root) / self.base_folder).exists())
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    return tmp_path / "files"


@pytest.mark.parametrize(("split", "count"), [("train", 3), ("test", 2)])
def test_a_data_set_of_torchvision_is_packed_by_its_name(cifar: Path, tmp_path: Path, split: str, count: int) -> None:
    words = ["shards", "pack", "torchvision:CIFAR100", str(tmp_path / "out"), "--root", str(cifar), "--split", split]
    assert main([*words, "--quiet"]) == 0
    index = load_index(tmp_path / "out")
    assert index.classes == ["apple", "bear"]
    found = dict(zip(numbers_of(index), index.labels_of(slice(None)).tolist(), strict=True))
    assert found == {number: [1, 0, 1][number] for number in range(count)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["torchvision:CIFAR100"], "CIFAR100: where are its files? Give --root FOLDER (--download fetches them"),
        (["torchvision:CIFAR", "--root", "x"], "not among torchvision's data sets. Near it: CIFAR10"),
        (["torchvision:CIFAR100", "--root", "ROOT/none"], "to download it. Is it in ROOT/none? --download"),
        (["torchvision:CIFAR100", "--root", "ROOT", "--split", "dev"], "has no such split. Choose train or test."),
        (["torchvision:CIFAR100", "--root", "ROOT", "--layout", "nhw"], "--layout nhw: torchvision:CIFAR100 is a data"),
        (["torchvision:ImageFolder", "--root", "ROOT", "--download"], "torchvision cannot download it. Leave --d"),
        (["ROOT", "--download"], "--download: ROOT is a folder. Omit the option."),
        (["ROOT", "--split", "train"], "--split train: ROOT is a folder. Omit the option."),
    ],
)  # fmt: skip
def test_what_torchvision_cannot_give_is_said(
    cifar: Path, tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    source, *rest = (word.replace("ROOT", str(cifar)) for word in words)
    assert main(["shards", "pack", source, str(tmp_path / "out"), *rest]) == 1
    assert message.replace("ROOT", str(cifar)) in capsys.readouterr().err


def test_nothing_is_downloaded_unless_it_is_asked_for(cifar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR100

    fetched: list[str] = []
    monkeypatch.setattr(CIFAR100, "download", lambda self: fetched.append(str(self.root)))
    for is_asked in (False, True):
        packed("torchvision:CIFAR100", cifar / f"out{is_asked}", root=str(cifar), download=is_asked)
        assert fetched == [str(cifar)] * is_asked


# ---- Hugging Face --------------------------------------------------------------------------------------------


@pytest.fixture
def table() -> Any:
    """Six JPEGs of Hugging Face's library with classes and a caption."""
    datasets = pytest.importorskip("datasets", reason="the optional library datasets is not installed")
    files = [encoded(photograph(20, 30, n), "JPEG") for n in range(6)]
    features = datasets.Features(
        {"caption": datasets.Value("string"), "img": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b"])}
    )
    rows = {
        "caption": list("uvwxyz"), "img": [{"bytes": file, "path": None} for file in files], "kind": [0, 1, 1, 0, 1, 0]
    }  # fmt: skip
    return datasets.Dataset.from_dict(rows, features=features)


def files_of(table: Any) -> list[bytes]:
    import datasets

    return [row["img"]["bytes"] for row in table.cast_column("img", datasets.Image(decode=False))]


def test_a_saved_table_is_packed_with_its_files_classes_and_splits(
    table: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    import datasets

    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "test": table.select([2, 0])}).save_to_disk(tmp_path / "both")
    capsys.readouterr()
    assert main(["shards", "pack", str(tmp_path / "one"), str(tmp_path / "a")]) == 0
    assert "columns that are not used: caption" in capsys.readouterr().out
    assert main(["shards", "pack", str(tmp_path / "both"), str(tmp_path / "b"), "--split", "test"]) == 0
    for name, numbers in (("a", range(6)), ("b", [2, 0])):
        index = load_index(tmp_path / name)
        reader, files = ShardReader(index, memory_limit_mb=0), files_of(table)
        assert (index.classes, suffixes(index)) == (["a", "b"], {".jpg"})
        found = {reader.read(sample): int(index.labels_of(slice(None))[sample]) for sample in range(len(index))}
        assert found == {files[number]: [0, 1, 1, 0, 1, 0][number] for number in numbers}
    assert main(["shards", "pack", str(tmp_path / "both"), str(tmp_path / "c")]) == 1
    assert "several splits. Choose one with --split: train, test." in capsys.readouterr().err
    assert main(["shards", "pack", str(tmp_path / "one"), str(tmp_path / "c"), "--label-column", "x"]) == 1
    assert "--label-column x: not among the columns caption, img, kind." in capsys.readouterr().err


def test_a_column_that_is_named_gives_the_labels(table: Any, tmp_path: Path) -> None:
    index = packed(table, tmp_path, label_column="caption")
    assert index.classes == list("uvwxyz")


def test_a_data_set_of_the_hub_is_asked_for_by_name_configuration_and_split(
    table: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import datasets

    asked: list[Any] = []
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *given: asked.append(given) or ["train", "test"])
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, split: asked.append((*given, split)) or table)
    words = ["shards", "pack", "hf:some/pets:small", str(tmp_path / "out"), "--split"]
    assert main([*words, "train"]) == 0
    assert asked == [("some/pets", "small"), ("some/pets", "small", "train")]
    assert len(load_index(tmp_path / "out")) == 6
    assert main([*words, "dev", "--overwrite"]) == 1
    assert "hf:some/pets:small: no split dev. Choose one with --split: train, test." in capsys.readouterr().err

    def fail(*_: Any) -> None:
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setattr(datasets, "get_dataset_split_names", fail)
    assert main([*words, "train", "--overwrite"]) == 1
    assert "hf:some/pets:small: cannot be loaded (ConnectionError: Couldn't reach the Hub)." in capsys.readouterr().err


def test_a_table_is_trained_on_by_its_files_and_classes(table: Any) -> None:
    index = python_index(table)
    assert (index.classes, index.labels_of(slice(None)).tolist()) == (["a", "b"], [0, 1, 1, 0, 1, 0])
    assert [index.read(sample) for sample in range(6)] == files_of(table)
    decoded = python_index(table.with_format("torch"))  # as its owner wants it
    assert decoded.image_size == [20, 30]
    assert decoded.classes is None
    with pytest.raises(ValueError, match="no column of images among caption, kind. Keep one"):
        python_index(table.remove_columns("img"))
    with pytest.raises(ValueError, match="IterableDataset: samples come one after the other"):
        python_index(table.to_iterable_dataset())


def test_without_the_library_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sslvit.environment.find_spec", lambda _: None)
    assert main(["shards", "pack", "hf:uoft-cs/cifar10", str(tmp_path / "out"), "--split", "train"]) == 1
    said = capsys.readouterr().err
    assert "hf:uoft-cs/cifar10: datasets is not installed. Run: pip install 'sslvit[datasets]'" in said
