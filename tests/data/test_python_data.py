"""Data sets given from Python: what a sample may be, batches like those of packed images, labels, refusals."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from shard_fixtures import encoded, photograph
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from torchvision.transforms.functional import to_tensor

from sslvit.data import python_data
from sslvit.data.array_images import array_samples
from sslvit.data.header import BadImage
from sslvit.data.index import ShardIndex
from sslvit.data.loader import TrainingBatches, encoder_views
from sslvit.data.open import open_shards
from sslvit.data.pack import pack
from sslvit.data.plan import EpochPlan
from sslvit.data.python_data import given_index, python_index, takes_datasets
from sslvit.data.python_samples import as_content
from sslvit.data.reader import ShardReader
from sslvit.data.sources import Sample
from sslvit.settings import EncoderSettings
from sslvit.settings.data import IN_WORDS, is_given
from sslvit.settings.views import CropSettings, MultiCropSettings

COUNT = 12


class Pictures(Dataset):
    """PIL images of several sizes and a label each, wrapped as a sample by `wrap`."""

    def __init__(self, images: list[Any], wrap=lambda image, label: (image, label)) -> None:
        self.images, self.wrap = images, wrap

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: int) -> Any:
        return self.wrap(self.images[item], item % 3)


class Memory:
    """Encoded images as a source of packing."""

    def __init__(self, contents: list[bytes]) -> None:
        self.contents = contents

    def read(self, item: int) -> bytes:
        return self.contents[item]

    def digest(self) -> str:
        return ""


def photographs(mode: str = "RGB") -> list[Image.Image]:
    return [photograph(30 + 3 * n, 50 - 2 * n, seed=n).convert(mode) for n in range(COUNT)]


def packed(folder: Path, images: list[Image.Image]) -> ShardIndex:
    """The images as PNGs in shards, in the order that they have."""
    source = Memory([encoded(image, "PNG") for image in images])
    samples = [Sample(f"{n:06d}", ".png", source, n, n % 3, 1) for n in range(len(images))]
    index = pack(samples, folder, ["a", "b", "c"], workers=1)
    assert index is not None
    return index


def batches(index: ShardIndex, order: np.ndarray, channels: int = 3, limit_mb: int = 0, view=None) -> list[Any]:
    """Two batches of a run whose sample numbers mean the images that `order` says."""
    encoder = EncoderSettings(16, patch=4, width=16, depth=1, heads=2, channels=channels)
    encoder.mean, encoder.std = [0.5] * channels, [0.3] * channels
    views = encoder_views(encoder, view or CropSettings(), seed=3)
    reader = ShardReader(index, channels, limit_mb)
    made = TrainingBatches(reader, views, EpochPlan(index.shard_samples, 5, 3), 0, 5, 1)
    renumbered = _Renumbered(made.plan, order)
    made.plan = renumbered  # type: ignore[assignment]
    return [made[number] for number in range(2)]


class _Renumbered:
    """A plan whose samples are renumbered: packing shuffles images, and views are keyed by the number of the sample."""

    def __init__(self, plan: EpochPlan, order: np.ndarray) -> None:
        self.plan, self.order = plan, order
        self.global_batch_size, self.seed = plan.global_batch_size, plan.seed

    def batch(self, *given: Any) -> tuple[np.ndarray, np.ndarray]:
        samples, epochs = self.plan.batch(*given)
        return self.order[samples], epochs


def number_of(index: ShardIndex) -> np.ndarray:
    """Number of the image that each sample of packed shards holds."""
    return np.array([int(Path(index.key(sample)).stem) for sample in range(len(index))])


def as_packed(dataset: Any, index: ShardIndex) -> Subset:
    """A data set in the order of packed shards."""
    return Subset(dataset, number_of(index).tolist())


SAMPLES = {
    "(image, label)": lambda image, label: (image, label),
    "alone": lambda image, label: image,
    "a dict": lambda image, label: {"img": image, "label": label},
    "a dict by other names": lambda image, label: {"depth": 1.0, "scan": image},
    "an array": lambda image, label: [np.asarray(image), label],
    "a tensor": lambda image, label: (torch.from_numpy(np.array(image)).permute(2, 0, 1), torch.tensor(label)),
    "a tensor from 0 to 1": lambda image, label: (to_tensor(image), np.int64(label)),
    "a file, as Hugging Face keeps it": lambda image, label: {"image": {"bytes": encoded(image, "PNG"), "path": None}},
}


@pytest.mark.parametrize("view", [CropSettings(), MultiCropSettings(local_crops=1, local_size=8)], ids=["crop", "dino"])
@pytest.mark.parametrize("kind", SAMPLES)
def test_batches_of_a_data_set_are_those_of_the_packed_images_bit_for_bit(tmp_path: Path, kind: str, view: Any) -> None:
    shards = packed(tmp_path, photographs())
    own = python_index(as_packed(Pictures(photographs(), SAMPLES[kind]), shards))
    same = np.arange(COUNT)
    for one, other in zip(batches(shards, same, view=view), batches(own, same, view=view), strict=True):
        assert one.samples.tolist() == other.samples.tolist()
        assert all(torch.equal(a, b) for a, b in zip(one.views, other.views, strict=True))
        assert one.views[0].dtype == torch.uint8
        assert int(one.views[0].max()) > 0
        assert not other.unreadable


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
@pytest.mark.parametrize("channels", [1, 3])
def test_modes_of_pil_are_converted_as_those_of_packed_images(tmp_path: Path, mode: str, channels: int) -> None:
    images = photographs(mode)
    shards = packed(tmp_path, [image.convert("RGB") if mode == "CMYK" else image for image in images])
    own = python_index(as_packed(Pictures(images), shards))
    for one, other in zip(*(batches(index, np.arange(COUNT), channels) for index in (shards, own)), strict=True):
        assert torch.equal(one.views[0], other.views[0])


@pytest.mark.parametrize(("dtype", "channels"), [(np.uint8, 1), (np.uint8, 5), (np.uint16, 1), (np.uint16, 3)])
def test_arrays_of_8_and_16_bits_and_of_any_channels_are_those_of_packed_ones(
    tmp_path: Path, dtype: type, channels: int
) -> None:
    source, top = np.random.default_rng(0), np.iinfo(dtype).max
    images = source.integers(0, top, (COUNT, 20, 24, channels), dtype, endpoint=True)
    shards = pack(array_samples(images), tmp_path, workers=1)
    assert shards is not None
    own = python_index(images[number_of(shards)])
    assert (own.channels, own.bits, own.image_size) == (shards.channels, shards.bits, shards.image_size)
    assert own.mean == pytest.approx(shards.mean, abs=1e-4)
    for limit in (0, 100):  # read one by one, and decoded once
        same = np.arange(COUNT)
        for one, other in zip(*(batches(index, same, channels, limit) for index in (shards, own)), strict=True):
            assert torch.equal(one.views[0], other.views[0])
            assert one.views[0].dtype == (torch.uint8 if dtype is np.uint8 else torch.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_floating_point_pixels_are_rounded_to_8_bits(dtype: type) -> None:
    between = (np.array([[0, 127.6, 254.7, 255.0]]) / 255).astype(dtype)
    for image in (between, torch.from_numpy(between)):
        assert np.asarray(as_content(image)).tolist() == [[0, 128, 255, 255]]


def test_a_picture_is_turned_as_its_exif_orientation_says() -> None:
    exif = Image.Exif()
    exif[274] = 6
    content = encoded(photograph(20, 30), "JPEG", exif=exif.tobytes())
    reader = ShardReader(python_index([Image.open(io.BytesIO(content))]), 3, 0)
    header = reader.header(reader.read(0))
    assert (header.height, header.width) == (30, 20)


def test_small_images_of_one_size_are_decoded_once_and_others_when_they_are_read() -> None:
    small = [np.full((8, 8, 3), n, np.uint8) for n in range(200)]
    assert ShardReader(python_index(small), 3).decoded is not None
    looked_at = python_index(small)
    odd = next(n for n in range(200) if n not in _items(small))
    small[odd] = np.zeros((9, 8, 3), np.uint8)
    index = python_index(small)
    assert index.image_size == [8, 8] == looked_at.image_size  # of those that were looked at
    reader = ShardReader(index, 3)
    assert reader.decoded is None
    assert not reader.unreadable


def _items(dataset: list) -> set[int]:
    """Samples that are read when a data set is opened."""
    seen: set[int] = set()
    python_index(Pictures(list(range(len(dataset))), lambda n, _: seen.add(n) or dataset[n]))
    return seen


# ---- what cannot be read -------------------------------------------------------------------------------------


def test_a_picture_that_is_damaged_where_it_is_first_read_is_unreadable(tmp_path: Path) -> None:
    """A data set may open files and leave reading their pixels to whoever takes them."""
    for number, image in enumerate(photographs()):
        image.save(tmp_path / f"{number}.png")
    content = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(content[: len(content) // 2])
    files = [tmp_path / f"{number}.png" for number in range(COUNT)]
    index = python_index(Opened(files))
    found = batches(index, np.arange(COUNT))
    assert [key for one in found for key in one.unreadable] == ["Opened[1]"]
    assert "damaged image" in next(reason for one in found for reason in one.unreadable.values())


class Opened(Dataset):
    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, item: int) -> Image.Image:
        return Image.open(self.files[item])


def test_labels_of_different_lengths_are_no_classes() -> None:
    several = [(image, [0] * (1 + item % 2)) for item, image in enumerate(photographs())]
    index = python_index(several)
    index.read_labels()
    assert index.classes is None
    assert "labels are not used: they are lists or arrays of different lengths" in index.label_note


def test_a_data_set_is_let_go_of_where_another_one_is_refused() -> None:
    @takes_datasets("train", "val", labels="needed")
    def evaluate(train: object, val: object) -> None:
        raise AssertionError

    labeled = [(image, item % 2) for item, image in enumerate(photographs())]
    with pytest.raises(ValueError, match="no labels, which are needed here"):
        evaluate(labeled, photographs())
    assert not python_data._given


def test_a_sample_that_cannot_be_made_is_named_and_replaced() -> None:
    def made(image: Image.Image, label: int) -> Any:
        if image.width == 50 - 2 * 4:
            raise KeyError("no such\nfile")
        return image

    own = python_index(Pictures(photographs(), made))
    found = [batch for batch in batches(own, np.arange(COUNT)) if batch.unreadable]
    assert [batch.unreadable for batch in found] == [{"Pictures[4]": r"KeyError: 'no such\nfile'"}]
    (row,) = np.nonzero(~found[0].valid.numpy())[0]
    assert found[0].samples[row] == 4
    assert int(found[0].views[0][row].max()) > 0
    with pytest.raises(BadImage, match="KeyError"):
        ShardReader(own, 3, 0).read(4)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 8, 3)) - 1, "from -1 to -1; floating-point pixels are from 0 to 1 .leave a normalization out"),
        (np.full((8, 8), np.nan), "values from nan to nan"),
        (np.zeros((3, 8, 8), np.uint8), "an array is 'h w c', a tensor is 'c h w'"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), "a tensor is 'c h w', an array is 'h w c'"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "a tensor of torch.int64; pixels are uint8, uint16, or floating"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"shape \(2, 3, 8, 8\); an image has two or three axes"),
        ("photo.jpg", "a str, and not an image: a PIL image, an array"),
        (Image.new("F", (4, 4)), "floating-point numbers, which have no agreed range"),
    ],
)
def test_what_is_no_image_is_said_before_the_run(image: Any, message: str) -> None:
    start = r"Wrapped: none of the 2 samples that .* holds an image. Wrapped\[0\]: "
    with pytest.raises(ValueError, match=f"{start}.*{message}"):
        python_index(Wrapped([image, image]))


class Wrapped(Dataset):
    def __init__(self, items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, item: int) -> Any:
        return (self.items[item], 0)


def test_a_dict_without_an_image_says_what_it_has() -> None:
    with pytest.raises(ValueError, match="a dict without an image .it has text, y; name it image"):
        python_index([{"text": "a", "y": 1}])


class Streamed(IterableDataset):
    def __iter__(self):
        return iter([])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Streamed(), "Streamed: samples come one after the other .* neither shuffled by the seed nor resumed. Give a"),
        (iter([1]), "list_iterator: samples come one after the other"),
        (
            DataLoader(Wrapped([1, 2])),
            "DataLoader: batches in an order of their own. Give its data set: load",
        ),
        ({"train": 1, "test": 2}, r"dict: several data sets. Give one of them: data\['train'\]"),
        (Wrapped([]), "Wrapped: no images in it"),
        (
            (np.zeros((9, 8, 8, 3), np.uint8), np.arange(9)),
            r"tuple: images and their labels.* list\(zip\(images, labels",
        ),
        ([torch.zeros(9, 3, 8, 8), [0] * 9], "list: images and their labels"),
    ],
)
def test_what_gives_no_samples_by_number_is_refused_with_the_reason(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        python_index(data)


def test_samples_that_change_from_one_reading_to_the_next_are_refused() -> None:
    source = np.random.default_rng(0)
    noisy = Pictures(photographs(), lambda image, label: source.integers(0, 255, (8, 8, 3)).astype(np.uint8))
    with pytest.raises(ValueError, match=r"Pictures\[0\] is another image each time .* Leave random transforms out"):
        python_index(noisy)


# ---- labels and names ----------------------------------------------------------------------------------------


class Listed(Pictures):
    """As torchvision's: all labels in an attribute."""

    classes = ("ant", "bee", "cat")

    def __init__(self, images: list[Any], targets: list[int]) -> None:
        super().__init__(images, lambda image, label: image)
        self.targets = targets


def labels_of(index: ShardIndex) -> list[int]:
    return index.labels_of(slice(None)).tolist()


def test_labels_are_taken_from_an_attribute_where_the_samples_agree() -> None:
    images = photographs()
    own = python_index(Subset(Listed(images, [n % 3 for n in range(COUNT)]), [5, 3, 1]))
    assert (own.classes, labels_of(own)) == (["ant", "bee", "cat"], [2, 0, 1])
    tensors = TensorDataset(torch.zeros(6, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 1, 0, 2, 2]))
    assert labels_of(python_index(tensors)) == [0, 1, 1, 0, 2, 2]
    others = Pictures(images)  # whose samples say n % 3
    others.targets = [0] * COUNT  # type: ignore[attr-defined]
    assert python_index(others).classes is None
    assert labels_of(python_index(others)) == [n % 3 for n in range(COUNT)]


def test_samples_are_read_for_their_labels_only_where_labels_are_needed() -> None:
    own = Pictures(photographs(), lambda image, label: (image, ["no", "yes", "no"][label]))
    assert python_index(own).classes is None
    named = python_index(own)
    assert (labels_of(named)[:3], named.classes) == ([0, 1, 0], ["no", "yes"])
    scores = Pictures(photographs(), lambda image, label: (image, label + 0.5))
    assert python_index(scores).classes is None
    with pytest.raises(ValueError, match="no labels, which are needed here .labels are not used: float64 numbers that"):
        python_index(scores).labels_of(slice(None))


def test_a_name_stands_for_a_data_set_while_the_call_runs_and_tells_it_from_others() -> None:
    seen: list[str] = []

    @takes_datasets("data", "online.train")
    def call(data: Any, **changes: Any) -> int:
        seen.append(data)
        assert open_shards(data).channels == 3
        return len(open_shards(changes["online.train"])) if changes else len(open_shards(data))

    images = [np.full((8, 8, 3), n % 251, np.uint8) for n in range(1234)]
    assert call(images) == 1234
    assert call(images[:7], **{"online.train": [(image, 0) for image in images[:5]]}) == 5
    assert seen[0].startswith("list of 1,234 images given from Python (")
    assert IN_WORDS.match(seen[0])
    with pytest.raises(ValueError, match="list of 1,234 images .* an object of a Python process, which no file holds"):
        given_index(seen[0])
    images[0] = images[0] + 1
    assert call(images[:7]) == 7
    assert len(set(seen)) == 3  # another image, another name
    assert not is_given("photos")
    assert not is_given(None)


def test_reading_a_sample_does_not_alias_the_users_own_array() -> None:
    own = np.zeros((4, 4, 5), np.uint8)
    content = as_content(own)
    own[:] = 7
    assert isinstance(content, np.ndarray)
    assert content.max() == 0


def test_a_call_within_a_call_leaves_the_outer_ones_data_set_where_it_is() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)

    @takes_datasets("data")
    def inner(data: Any) -> int:
        return len(given_index(data))

    @takes_datasets("data")
    def outer(data: Any) -> int:
        assert inner(pixels) == 5
        return len(given_index(data))

    assert outer(pixels) == 5
    with pytest.raises(ValueError, match="an object of a Python process"):
        given_index(python_index(pixels).location)
