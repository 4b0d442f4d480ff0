"""CNNs and networks of one's own, probed beside the vision transformer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from shard_fixtures import labeled_shards, two_classes
from torch import nn
from torchvision.models import get_model

import sslvit
from sslvit.checkpoint import fingerprint, load_encoder, save_encoder
from sslvit.cli import main
from sslvit.data.loader import center_view, evaluation_loader, normalized_view
from sslvit.data.open import open_shards
from sslvit.data.reader import ShardReader
from sslvit.evaluate.probe import untrained
from sslvit.evaluate.sources import frozen
from sslvit.models import Backbone
from sslvit.settings import EncoderSettings

RESNET = "torchvision:resnet18"


class Tiny(nn.Module):
    """A network of one's own."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.norm = nn.BatchNorm2d(8)
        self.factor = factor

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.factor * self.norm(self.conv(images)).relu().mean((2, 3))


def own(net: nn.Module, side: int = 8) -> Backbone:
    return Backbone(net, EncoderSettings(backbone="own", image_size=side))


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return labeled_shards(tmp_path_factory.mktemp("labeled"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A file as torchvision saves a classifier."""
    torch.manual_seed(3)
    net = get_model("resnet18", weights=None)
    file = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(net.state_dict(), file)
    return file


def images_of(folder: Path, settings: EncoderSettings) -> torch.Tensor:
    reader = ShardReader(open_shards(str(folder)), settings.channels, 64)
    loader = evaluation_loader(reader, settings, 64, 0, 0, 1, center_view(settings))
    batch = next(iter(loader))
    return normalized_view(batch, settings, torch.device("cpu"))[batch.valid]


def without_classifier(file: Path) -> nn.Module:
    net = get_model("resnet18", weights=None)
    net.load_state_dict(torch.load(file, weights_only=True))
    net.fc = nn.Identity()
    return net.eval()


@torch.no_grad()
def test_features_of_a_resnet_are_its_own_forward_before_the_classifier(shards, weights) -> None:
    encoder = load_encoder(f"{RESNET}@{weights}", image_size=32)
    found = sslvit.embed(encoder, shards / "val", device="cpu", workers=0)
    images = images_of(shards / "val", encoder.settings)
    expected = without_classifier(weights)(images)
    assert found.features.shape == (21, 512)
    assert np.abs(found.features - expected.numpy()).max() < 1e-6


@torch.no_grad()
def test_layers_of_a_resnet_are_the_means_of_its_feature_maps(weights) -> None:
    encoder = load_encoder(f"{RESNET}@{weights}", image_size=32)
    images = torch.randn(2, 3, 32, 32)
    net = without_classifier(weights)
    maps = net.layer2(net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(images))))))
    source = frozen(encoder)
    second, last, output = source.features_at(images, [(2, "mean"), (4, "mean"), *source.readouts(None, 1, None)])
    assert torch.allclose(second, maps.mean((2, 3)), atol=1e-6)
    assert torch.allclose(last, output, atol=1e-6)  # a ResNet's own pooling


def test_knn_of_a_resnet_is_that_of_its_features(shards, weights) -> None:
    name = f"{RESNET}@{weights}"
    encoder = load_encoder(name, image_size=32)
    table = sslvit.knn(encoder, shards / "train", shards / "val", neighbors=[1], device="cpu", baselines=False)
    net = without_classifier(weights)
    with torch.no_grad():
        train, val = (F.normalize(net(images_of(shards / part, encoder.settings)), dim=1) for part in ("train", "val"))
    labels = {part: torch.tensor(open_shards(str(shards / part)).labels_of(slice(None))) for part in ("train", "val")}
    nearest = labels["train"][(val @ train.T).argmax(1)]
    assert table.rows["encoder"]["kNN, k = 1"] == pytest.approx(100 * float((nearest == labels["val"]).double().mean()))
    assert "encoder: torchvision:resnet18" in str(table)


def test_the_fingerprint_changes_with_the_weights_and_with_what_a_module_computes(weights) -> None:
    one, same, other = (load_encoder(f"{RESNET}@{weights}"), load_encoder(f"{RESNET}@{weights}"), load_encoder(RESNET))
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)
    assert fingerprint(other) == fingerprint(load_encoder(RESNET))  # random weights are the same ones again
    with torch.no_grad():
        same.net.bn1.running_mean[0] += 1
    assert fingerprint(one) != fingerprint(same)
    tiny, scaled = Tiny(), Tiny(2.0)
    scaled.load_state_dict(tiny.state_dict())
    assert fingerprint(own(tiny)) != fingerprint(own(scaled))


def test_the_untrained_twin_has_the_architecture_and_other_weights(weights) -> None:
    encoder = load_encoder(f"{RESNET}@{weights}", image_size=32)
    twin, again = untrained(encoder, 0), untrained(encoder, 0)
    assert fingerprint(twin) == fingerprint(again) != fingerprint(encoder)
    tiny = own(Tiny())
    with torch.no_grad():
        tiny.net.norm.running_mean += 5
    twin = untrained(tiny, 0)
    assert not torch.equal(twin.net.conv.weight, tiny.net.conv.weight)
    assert twin.net.norm.running_mean.abs().max() == 0
    assert tiny.net.norm.running_mean.min() == 5


def test_a_module_that_cannot_be_reset_has_no_untrained_row(shards, caplog) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean((2, 3)) @ self.weight

    table = sslvit.knn(own(Plain()), shards / "train", shards / "val", neighbors=[3], device="cpu")
    assert list(table.rows) == ["raw pixels", "encoder"]


class Projection(nn.Module):
    """A fixed feature extractor: random projections of the pixels, kept in a buffer."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))  # integers tell no precision
        self.register_buffer("directions", torch.randn(192, 8, dtype=dtype))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) @ self.directions


@pytest.mark.parametrize(
    "net", [nn.Flatten(), Projection(), Projection(torch.float64)], ids=["nothing", "buffers", "float64"]
)
def test_a_module_without_parameters_is_scored_and_has_no_untrained_row(tmp_path, shards, net, caplog) -> None:
    encoder, data = own(net), (shards / "train", shards / "val")
    found = sslvit.embed(encoder, data[1], device="cpu", workers=0)
    images = images_of(data[1], encoder.settings)
    expected = images.flatten(1) if isinstance(net, nn.Flatten) else net(images.to(net.directions.dtype))
    np.testing.assert_allclose(found.features, expected.numpy(), rtol=1e-5, atol=1e-5)
    linear = sslvit.probe(encoder, *data, neighbors=[1], device="cpu", cache=None).rows
    assert list(linear) == ["raw pixels", "encoder"]  # an untrained copy would be the same network again
    if isinstance(net, nn.Flatten):
        assert linear["encoder"] == linear["raw pixels"]
    assert "none of its modules has reset_parameters()" in caplog.text
    assert list(sslvit.knn(encoder, *data, neighbors=[1], device="cpu", cache=None).rows) == list(linear)
    assert list(sslvit.compare({"fixed": encoder}, *data, neighbors=[1], device="cpu", cache=None).rows)[-1] == "fixed"
    assert list(sslvit.health(encoder, data[1], device="cpu").rows) == list(linear)
    picture = sslvit.show("neighbors", encoder, data[1], tmp_path / "neighbors.png", images=2)
    assert picture.path.exists()


def test_a_module_from_python_is_probed_as_it_is(shards) -> None:
    net = Tiny().eval()
    table = sslvit.compare({"tiny": own(net), "other": own(Tiny(3.0))}, shards / "train", shards / "val",
                           protocol=None, neighbors=[1], device="cpu")  # fmt: skip
    assert list(table.rows) == ["raw pixels", "tiny untrained", "tiny", "other untrained", "other"]
    assert "tiny: Tiny from Python" in str(table)
    measures = sslvit.health(own(net), shards / "val", device="cpu")
    assert "encoder" in measures.rows


def test_every_layer_of_a_resnet_is_probed(shards) -> None:
    encoder = load_encoder(RESNET, image_size=8)
    table = sslvit.probe(encoder, shards / "train", shards / "val", layers="all", neighbors=[], device="cpu",
                         baselines=False)  # fmt: skip
    assert list(table.rows) == [f"layer {number}" for number in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    "protocol",
    [
        {"name": "mae", "epochs": 1, "warmup_epochs": 0},
        {"name": "dino", "epochs": 1},
        {"name": "dinov2", "iterations": 2},
    ],
    ids=str,
)
def test_the_papers_probes_take_the_vector_of_a_network(shards, protocol) -> None:
    table = sslvit.probe(own(Tiny()), shards / "train", shards / "val", protocol=protocol, neighbors=[], device="cpu",
                         baselines=False)  # fmt: skip
    assert table.about["probed"]["encoder"]["linear"]["features"] == "the network's output"


def test_a_probe_of_the_middle_layer_needs_stages(shards) -> None:
    with pytest.raises(ValueError, match="tells no stages"):
        sslvit.probe(own(Tiny()), shards / "train", shards / "val", protocol="igpt", neighbors=[], device="cpu")


class Branches(nn.Module):
    """Stages as some networks of timm have them: the whole network, a list of maps, and one that is never called."""

    feature_info = [{"module": ""}, {"module": "pair"}, {"module": "unused"}]  # noqa: RUF012 timm's attribute

    def __init__(self) -> None:
        super().__init__()
        self.pair, self.unused = Pair(), nn.Conv2d(3, 8, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.pair(images)[0].mean((2, 3))


class Pair(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(3, 8, 3)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [super().forward(images), images]


@pytest.mark.parametrize(("layer", "name"), [(1, "pair"), (2, "unused")])
def test_a_stage_without_a_feature_map_is_refused(layer: int, name: str) -> None:
    """As in timm's CrossViT, HRNet and CoaT."""
    with pytest.raises(ValueError, match=f"--layer {layer}: {name} gives no feature maps"):
        frozen(own(Branches())).features_at(torch.zeros(1, 3, 8, 8), [(layer, "mean")])


def test_a_network_as_a_whole_is_none_of_its_stages() -> None:
    assert own(Branches()).stages == ["pair", "unused"]


def test_weights_with_a_tag_are_read_from_torchs_cache(tmp_path, weights, monkeypatch) -> None:
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth").write_bytes(weights.read_bytes())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    found = load_encoder(f"{RESNET}@IMAGENET1K_V1")
    assert fingerprint(found) == fingerprint(load_encoder(f"{RESNET}@{weights}"))
    seen = found.settings
    assert (seen.image_size, seen.crop_fraction, seen.interpolation) == ([224, 224], 0.875, "bilinear")


def test_without_a_network_one_line_says_where_the_weights_are(tmp_path, monkeypatch) -> None:
    def refuse(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(ValueError, match=r"resnet18@IMAGENET1K_V1: its weights .* give the file: .*@FILE") as error:
        load_encoder(f"{RESNET}@IMAGENET1K_V1")
    assert "\n" not in str(error.value)


def test_a_cached_file_that_would_run_code_is_refused(tmp_path, monkeypatch) -> None:
    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save({"conv1.weight": Evil()}, tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="could run code"):
        load_encoder(f"{RESNET}@IMAGENET1K_V1")
    assert not (tmp_path / "ran").exists()


def test_a_network_whose_code_asks_for_its_version_is_saved_and_loaded(tmp_path) -> None:
    encoder = load_encoder("torchvision:mnasnet0_5", image_size=32)
    loaded = load_encoder(save_encoder(encoder, tmp_path / "encoder"))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(encoder(images), loaded(images))


def test_a_network_of_timms_that_is_no_plain_transformer_is_a_backbone(tmp_path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(1)
    net = timm.create_model("resnet18", pretrained=False)
    torch.save({"state_dict": {f"module.{key}": value for key, value in net.state_dict().items()}}, tmp_path / "w.pth")
    encoder = load_encoder(f"timm:resnet18@{tmp_path / 'w.pth'}", image_size=32)
    net.reset_classifier(0)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(encoder(images), net.eval()(images), atol=1e-6)
    assert encoder.stages == ["layer1", "layer2", "layer3", "layer4"]
    assert isinstance(load_encoder("timm:mobilenetv3_small_100"), Backbone)


def test_a_teacher_in_a_file_of_dinos_is_found_below_its_prefix(tmp_path, weights) -> None:
    state = torch.load(weights, weights_only=True)
    nested = {name: {f"module.backbone.{key}": value + (name == "student") for key, value in state.items()}
              for name in ("student", "teacher")}  # fmt: skip
    torch.save(nested, tmp_path / "dino.pth")
    found = load_encoder(f"{RESNET}@{tmp_path / 'dino.pth'}")
    assert torch.equal(found.net.conv1.weight, state["conv1.weight"])


def test_gray_images_and_the_small_stem_change_the_first_convolution() -> None:
    encoder = load_encoder(RESNET, channels=1, mean=[0.5], std=[0.25], small_stem=True, image_size=32)
    assert tuple(encoder.net.conv1.weight.shape) == (64, 1, 3, 3)
    assert encoder.maps(torch.zeros(1, 1, 32, 32), [1])[1][1].shape[2:] == (32, 32)
    with pytest.raises(ValueError, match="small_stem: vgg11 has no 7 x 7"):
        load_encoder("torchvision:vgg11", small_stem=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision:resnet19", "torchvision has no such model. Did you mean resnet18"),
        ("torchvision:resnet18@V7", "no such weights, and no such file (torchvision's are IMAGENET1K_V1)"),
        ("torchvision:squeezenet1_0", "ends in no linear classifier"),
        ("timm:resnet18.nothing", "no such weights (timm's are timm:resnet18.a1_in1k"),
        ("timm:resnet1888", "Did you mean resnet18"),
    ],
)
def test_a_name_that_is_unknown_is_said_in_one_line_on_the_command_line(capsys, tmp_path, name, message) -> None:
    if name.startswith("timm"):
        pytest.importorskip("timm")
    two_classes(tmp_path, train=4, val=4)
    assert main(["knn", name, "--train", str(tmp_path / "train"), "--val", str(tmp_path / "val")]) != 0
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layer", "5"], "stages 1 to 4"), (["--pooling", "class"], "has no tokens"),
        (["--blocks", "2"], "stages of different widths"),
    ],
)  # fmt: skip
def test_readouts_that_a_network_does_not_have_are_refused(capsys, shards, options, message) -> None:
    words = ["probe", RESNET, "--train", str(shards / "train"), "--val", str(shards / "val"), "--image-size", "8", "8"]
    assert main([*words, *options]) != 0
    assert message in capsys.readouterr().err


def test_what_gives_no_vector_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gives \(1, 3, 222, 222\) for one image, and is to give one vector"):
        Backbone(nn.Conv2d(3, 3, 3))
    with pytest.raises(ValueError, match=r"takes no 3 x 4 x 4 images"):
        own(nn.Sequential(nn.Conv2d(3, 3, 7), nn.Flatten()), 4)


def test_commands_score_and_show_a_network_by_its_name(capsys, tmp_path, shards) -> None:
    size, name = ["--image-size", "8", "8"], RESNET
    data = ["--train", str(shards / "train"), "--val", str(shards / "val")]
    assert main(["knn", name, *data, *size, "--neighbors", "3", "--json"]) == 0
    assert "encoder" in json.loads(capsys.readouterr().out)["rows"]
    assert main(["embed", name, str(shards / "val"), "-o", str(tmp_path / "found.npz"), *size]) == 0
    assert np.load(tmp_path / "found.npz")["features"].shape == (21, 512)
    for what in ("neighbors", "field"):
        file = tmp_path / f"{what}.png"
        words = ["show", what, name, str(shards / "val"), "-o", str(file), "--images", "2", *size]
        assert main(words) == 0
        assert Image.open(file).size[0] > 100
    capsys.readouterr()
    for words in (["show", "attention", name, str(shards / "val"), "-o", str(tmp_path / "a.png")],
                  ["export", name, str(tmp_path / "out"), "--format", "timm"]):  # fmt: skip
        assert main(words) != 0
        assert "takes a vision transformer of sslvit, and this is torchvision:resnet18" in capsys.readouterr().err


def test_a_network_in_training_mode_is_evaluated_and_remains_as_it_was(shards: Path) -> None:
    net = Tiny().train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    # in training mode, batch normalization would normalize by the batch, and change its statistics
    sslvit.show("neighbors", own(net), shards / "val", images=2)
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key
    sslvit.embed(own(net), shards / "val", device="cpu", workers=0)
    assert all(module.training for module in net.modules())
