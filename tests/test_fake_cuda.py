"""What would end a run on a GPU, found on a machine without one: tensors on two devices, kernels that cannot repeat."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fake_cuda_fixtures import GPU, on_fake_cuda, repeatable_kernels, take_fake_cuda
from PIL import Image
from run_fixtures import BERT, TINY_DINO, TINY_IGPT, losses, metrics, run
from shard_fixtures import labeled_shards
from torch._subclasses.fake_tensor import FakeTensorMode

import sslvit
from sslvit.checkpoint import save_encoder
from sslvit.data.batch import Batch
from sslvit.data.color import sample_colors
from sslvit.data.index import load_index
from sslvit.data.views import Views, jitter_views
from sslvit.evaluate import attention, health
from sslvit.evaluate.dense import MaskedImages, segment
from sslvit.evaluate.knn import knn_accuracies
from sslvit.evaluate.label_free import measure_health
from sslvit.evaluate.likelihood import likelihood
from sslvit.evaluate.linear import fit_probe
from sslvit.evaluate.probe import probe
from sslvit.evaluate.samples import complete_images, sample_images
from sslvit.evaluate.sources import Features, LabeledSet
from sslvit.models import ViTEncoder
from sslvit.models.sampling import complete
from sslvit.models.tokens import TOKENIZERS
from sslvit.optim.guard import HostCopy
from sslvit.palette import nearest_color, nearest_rows, squared_error, uniform_palette
from sslvit.run_plan import RunPlan
from sslvit.settings import EncoderSettings, OptimSettings, ProbeSettings
from sslvit.settings.encoder import PositionKind
from sslvit.settings.load import load_recipe
from sslvit.settings.protocols import PROTOCOLS
from sslvit.settings.sample import SampleSettings
from sslvit.settings.views import MultiCropSettings
from sslvit.tasks import task_class
from sslvit.tasks.base import Task
from sslvit.tasks.igpt import IGPT
from sslvit.train.callbacks.health import measure

pytestmark = pytest.mark.filterwarnings("ignore:.*device_type of 'cuda'.*", "ignore:.*no accelerator is found.*")
MIXED = "Expected all tensors to be on the same device"
NOT_REPEATABLE = "does not have a deterministic implementation"


def on_gpu(*shape: int, **options) -> torch.Tensor:
    return torch.ones(*shape, device=GPU, **options)


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    take_fake_cuda(monkeypatch)
    with on_fake_cuda():
        yield


@pytest.fixture
def repeatable() -> Iterator[None]:
    with repeatable_kernels():
        yield


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return labeled_shards(tmp_path)


# ---- the device that is not there ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mix",
    [
        lambda: on_gpu(3) * torch.arange(3), lambda: torch.zeros(3).add_(on_gpu(3)),
        lambda: on_gpu(3) + on_gpu(3).cpu(),
        lambda: torch.stack([on_gpu(()), torch.tensor(1.0)]), lambda: torch.cat([on_gpu(3), torch.zeros(1)]),
        lambda: torch.zeros(3)[on_gpu(2, dtype=torch.long)], lambda: F.linear(on_gpu(2, 3), torch.zeros(4, 3)),
        lambda: torch.searchsorted(on_gpu(3), torch.tensor([1.0])), lambda: torch.nn.Linear(3, 3)(on_gpu(2, 3)),
        lambda: F.cross_entropy(on_gpu(2, 3), torch.tensor([0, 1])),
    ],
)  # fmt: skip
def test_the_fake_device_refuses_tensors_of_the_cpu(mix: Callable, fake_cuda: None) -> None:
    with pytest.raises(RuntimeError, match=MIXED):
        mix()


def test_the_fake_device_takes_what_a_gpu_takes(fake_cuda: None) -> None:
    values = on_gpu(3, requires_grad=True)
    half = values * torch.tensor(0.5)  # a number without dimensions
    parts = [
        half[torch.tensor([0, 2])],
        half.chunk(2)[0].double(),
        F.one_hot(on_gpu(2, dtype=torch.long)),
        half.to(GPU),
    ]
    assert all(part.device == GPU for part in parts)
    half.chunk(2)[0].sum().backward()  # the other chunk's gradient is made inside torch
    assert values.grad.device == GPU
    assert values.grad.cpu().tolist() == [0.5, 0.5, 0]
    assert torch.zeros(3).device == half.cpu().device == torch.device("cpu")
    with pytest.raises(TypeError, match="numpy"):
        half.detach().numpy()
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, generator=torch.Generator(), device=GPU)


@pytest.mark.parametrize(
    "kernel",
    [
        lambda: on_gpu(3).cumsum(0), lambda: on_gpu(3).histc(), lambda: torch.bincount(on_gpu(3).long(), on_gpu(3)),
        lambda: F.interpolate(on_gpu(1, 1, 2, 2, requires_grad=True), size=(3, 3), mode="bicubic").sum().backward(),
    ],
)  # fmt: skip
def test_the_fake_device_refuses_kernels_that_cannot_repeat(
    kernel: Callable, fake_cuda: None, repeatable: None
) -> None:  # fmt: skip
    on_gpu(3).long().cumsum(0)
    with pytest.raises(RuntimeError, match=NOT_REPEATABLE):
        kernel()


def test_health_takes_the_spectrum_of_a_few_features_on_the_cpu(
    fake_cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    monkeypatch.setattr("sslvit.train.callbacks.health.label_free", lambda features: seen.append(features) or {})
    measure({"features": on_gpu(4100, 8, dtype=torch.bfloat16)})
    assert (seen[0].device.type, len(seen[0]), seen[0].dtype) == ("cpu", 456, torch.float32)  # every ninth of 4,100


def test_a_copy_to_the_host_is_waited_for_where_it_is_queued(fake_cuda: None) -> None:
    """Of several processes none has made its GPU the current device of torch."""
    copy = HostCopy(on_gpu(3))
    assert copy.arrival.stream == f"the stream of {GPU}"
    assert not copy.is_here
    assert copy.read().tolist() == [1, 1, 1]


def test_an_encoder_returns_to_its_device_and_is_drawn_from_any(shards: Path, tmp_path: Path, fake_cuda: None) -> None:
    val, encoder = shards / "val", small_encoder().to("cpu")
    sslvit.health(encoder, val, workers=0)
    assert {value.device.type for value in encoder.state_dict().values()} == {"cpu"}
    encoder.to(GPU)
    for what in ("attention", "pca", "similarity", "distance", "field", "neighbors"):
        assert len(sslvit.show(what, encoder, val, images=2).png) > 1000
    assert {value.device.type for value in encoder.state_dict().values()} == {"cuda"}


# ---- whole runs: steps, health, lines of metrics, checkpoints, scores, pictures ------------------------------------

RUNS = {
    "mae": ("mae/digits", {}, ("reconstruction", "patches")),
    "mae and edges": ("mae/digits", {"task.hog_weight": 1.0}, ("reconstruction", "patches")),
    "dino": ("dino/digits", {"task.koleo": 0.1, "task.batch_norm": True}, ("attention", "patches")),
    "dino sinkhorn": ("dino/digits", {"task.centering": "sinkhorn", "optim.clip_grad_by": "parameter"}, ("attention",)),
    "igpt": ("igpt/digits", {}, ("generated", "completed")),
    "bert": ("igpt/digits", BERT, ("filled",)),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_pretraining_run_on_a_gpu_reaches_its_end(
    name: str, shards: Path, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sslvit.train.pictures.IMAGES", 2)  # drawing takes longer than all the rest
    recipe, changes, figures = RUNS[name]
    online = {"online.train": str(shards / "train"), "online.val": str(shards / "val"), "online.every": 2,
              "online.images": 9}  # fmt: skip
    options = changes | {"recipe": recipe, "train.steps": 2, "train.micro_batch_size": 4}
    on_cpu = run(shards / "train", tmp_path / "cpu", **options)
    request.getfixturevalue("repeatable")
    request.getfixturevalue("fake_cuda")
    folder = run(shards / "train", tmp_path / "gpu", **options, **online, **{"train.deterministic": True})
    lines = metrics(folder)
    assert [line["train/loss"] for line in lines] == pytest.approx(losses(on_cpu), rel=1e-3)
    assert {"probe/knn", "probe/linear", "probe/rankme"} <= lines[-1].keys()
    assert {"health/rankme", "health/alpha", "health/uniformity"} <= lines[-1].keys()
    assert json.loads(folder.health.read_text())["measures"]["alpha"] == lines[-1]["health/alpha"]
    assert {"loss", "views", *figures} <= {path.stem for path in folder.figures.glob("*.png")}
    assert sslvit.load_encoder(folder.path).settings.width == 16


def test_a_fine_tuning_run_on_a_gpu_reaches_its_end(
    shards: Path, tmp_path: Path, repeatable: None, fake_cuda: None
) -> None:  # fmt: skip
    encoder = EncoderSettings(image_size=8, channels=1, patch=4, width=16, depth=2, heads=2)
    save_encoder(ViTEncoder(encoder), tmp_path / "encoder")
    folder = sslvit.finetune(
        tmp_path / "encoder", shards / "train", shards / "val", out=tmp_path / "run",
        **{"data.global_batch_size": 10, "data.workers": 0, "train.steps": 3, "train.log_every": 1, "task.erase": 1.0,
           "train.precision": "float32", "train.accelerator": "cpu", "train.deterministic": True,
           "task.validate_every": 1, "encoder.image_size": 16},
    )  # fmt: skip
    lines = metrics(folder)
    assert len(lines) == 3
    assert all({"train/loss", "health/rankme", "health/alpha", "val/top1"} <= line.keys() for line in lines)
    assert json.loads(folder.scores.read_text())["images"] == 21


# ---- a step of each kind of encoder --------------------------------------------------------------------------------

ENCODERS = {
    "learned_1d on other grids": {"pos_embed": "learned_1d"}, "learned_2d": {"pos_embed": "learned_2d"},
    "rotary_2d": {"pos_embed": "rotary_2d"}, "DINOv3's": {"pos_embed": "rotary_2d_normalized", "key_bias": False},
    "relative_bias on other grids": {"pos_embed": "relative_bias"},
    "sincos_2d": {"pos_embed": "sincos_2d"}, "DINO's offset": {"interpolate_offset": 0.1},
    "registers": {"registers": 2}, "locality_self_attention": {"locality_self_attention": True},
    "shifted patches": {"tokens": "shifted_patch"},
    "conv stem": {"tokens": "conv_stem"}, "mbconv": {"tokens": "mbconv"}, "hybrid": {"tokens": "hybrid", "patch": 4},
    "swiglu": {"mlp": "swiglu", "qk_norm": True, "norm": "rms"},
    "activation_checkpointing": {"activation_checkpointing": True},
    "layer scale": {"layer_scale": 1e-5, "dropout": 0.1}, "attention pool": {"pooling": "attention"},
}  # fmt: skip


@pytest.mark.parametrize("name", ENCODERS)
def test_a_step_of_any_encoder_on_a_gpu_can_be_repeated(name: str, fake_cuda: None, repeatable: None) -> None:
    kind = {"image_size": 16, "patch": 4, "width": 16, "depth": 2, "heads": 2, "drop_path": 0.1} | ENCODERS[name]
    encoder = ViTEncoder(EncoderSettings(**kind)).to(GPU).train()
    sizes = (16, 24) if kind.get("tokens") != "hybrid" else (16,)
    for size in sizes:
        images = torch.rand(3, 3, size, size, device=GPU)
        encoder.pool(encoder(images)).square().sum().backward()
        assert encoder.blocks[0].mlp.fc1.weight.grad.device == GPU
        with torch.no_grad():
            encoder.layers(images, [1, 2])
            encoder.features(images)
            [found.patch_map() for found in encoder.intermediates(images, [2], attention=True)]


@pytest.mark.parametrize("positions", get_args(PositionKind))
@pytest.mark.parametrize("tokens", TOKENIZERS)
def test_every_tokenizer_with_every_kind_of_positions_on_a_gpu(tokens: str, positions: str, fake_cuda: None) -> None:
    kind = {"image_size": 8, "patch": 4, "width": 16, "depth": 1, "heads": 2, "tokens": tokens, "pos_embed": positions}
    kind |= {"patch": 1, "causal": True, "class_token": False, "pooling": "mean"} if tokens == "pixel" else {}
    encoder = ViTEncoder(EncoderSettings(**kind)).to(GPU).train()
    encoder.pool(encoder(torch.rand(2, 3, 8, 8, device=GPU))).square().sum().backward()
    assert {parameter.grad.device for parameter in encoder.parameters() if parameter.grad is not None} == {GPU}


@pytest.mark.parametrize(
    "positions", ["none", "learned_1d", "learned_2d", "sincos_1d", "rotary_2d", "rotary_2d_normalized", "relative_bias"]
)
@pytest.mark.parametrize(("top_k", "top_p", "temperature"), [(None, 1.0, 1.0), (3, 0.9, 0.7), (None, 1.0, 0.0)])
def test_pixels_drawn_on_a_gpu_can_be_repeated_and_are_those_of_a_cpu(
    positions: str, top_k: int | None, top_p: float, temperature: float, fake_cuda: None, repeatable: None
) -> None:  # fmt: skip
    task = pixel_model(pos_embed=positions)
    settings = SampleSettings(batch=2, top_k=top_k, top_p=top_p, temperature=temperature)
    given = torch.zeros(3, 5, dtype=torch.long)
    on_cpu = complete(task.encoder, task.model.head, given, settings)
    task.to(GPU)
    drawn = complete(task.encoder, task.model.head, given, settings)
    assert drawn.device == GPU
    assert torch.equal(drawn.cpu(), on_cpu)


# ---- what evaluates on a device ------------------------------------------------------------------------------------


def pixel_model(**changes) -> IGPT:
    torch.manual_seed(0)
    encoder = EncoderSettings(
        image_size=4, channels=1, tokens="pixel", patch=1, width=16, depth=1, heads=2, causal=True, class_token=False,
        pooling="mean", **changes,
    )  # fmt: skip
    task = task_class("igpt")(load_recipe("igpt/digits").task, encoder, OptimSettings(), RunPlan(4, 2, 8))
    torch.nn.init.normal_(task.model.head.weight)
    return task.eval()


def small_encoder(**changes) -> ViTEncoder:
    torch.manual_seed(0)
    settings = EncoderSettings(image_size=8, channels=1, patch=4, width=16, depth=2, heads=2)
    return ViTEncoder(replace(settings, **changes)).to(GPU).eval()


def features(seed: int = 0) -> Features:
    source = torch.Generator().manual_seed(seed)
    return Features(torch.randn(30, 6, generator=source), torch.arange(30) % 3)


def images_on_gpu(size: int = 8) -> torch.Tensor:
    return torch.rand(3, 1, size, size, device=GPU)


def spectrum(_: Path) -> None:
    values = torch.randn(20, 12, device=GPU)
    assert health.label_free(values).keys() == {"feature_std", "rankme", "alpha", "uniformity"}
    health.alignment(values, values.flip(0))
    health.largest_fraction(on_gpu(5, dtype=torch.long))


def pictures_of_attention(_: Path) -> None:
    encoder = small_encoder(pooling="class")
    attention.mass_mask(attention.class_attention(encoder, images_on_gpu(16)))
    attention.patch_colors(encoder, images_on_gpu())
    attention.attention_measures(encoder, images_on_gpu())
    attention.receptive_field(encoder.features, images_on_gpu())


def heads(_: Path) -> None:
    one, other = features(), features(1)
    fit_probe(one, 3, device=str(GPU)).accuracy(other)
    knn_accuracies(one, other, 3, [1, 5], 0.07, str(GPU))


SHORT = {
    "logreg": {}, "igpt": {}, "mae": {"epochs": 2, "warmup_epochs": 1, "batch": 10}, "dino": {"epochs": 2, "batch": 10},
    "dinov2": {"iterations": 3, "batch": 10},
}  # fmt: skip


def by_protocol(name: str) -> Callable[[Path], None]:
    def evaluate(shards: Path) -> None:
        settings = ProbeSettings(
            str(shards / "train"), str(shards / "val"), neighbors=[3], batch=8, device="cuda", cache=None,
            protocol=PROTOCOLS[name](**SHORT[name]),
        )  # fmt: skip
        assert probe({"encoder": small_encoder()}, settings).rows["encoder"]

    return evaluate


def segmentation(shards: Path) -> None:
    for part in ("images", "masks"):
        (shards / "dense" / part).mkdir(parents=True)
    source = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(source.integers(0, 255, (8, 8), np.uint8)).save(shards / f"dense/images/{i}.png")
        Image.fromarray(source.integers(0, 2, (8, 8), np.uint8)).save(shards / f"dense/masks/{i}.png")
    data = MaskedImages.open(shards / "dense")
    segment({"raw pixels": None, "encoder": small_encoder()}, data, data, 2, device="cuda")


def without_labels(shards: Path) -> None:
    data = LabeledSet(load_index(shards / "val"), 1, np.arange(9))
    measure_health({"encoder": small_encoder()}, data, ProbeSettings("", "", batch=4))


def pixels(shards: Path) -> None:
    task = pixel_model().to(GPU)
    train, val = (LabeledSet(load_index(shards / name), task.encoder.settings.channels) for name in ("train", "val"))
    likelihood(task.model, train, val, 4)
    sample_images(task.model, 3, SampleSettings())
    complete_images(task.model, str(shards / "val"), 2, 0.5, 2, SampleSettings())


def colors(_: Path) -> None:
    views, samples = MultiCropSettings(jitter=1.0, solarize=[0.5, 0.5, 0.5]), np.arange(6)
    for channels in (1, 3):
        images = [torch.rand(6, channels, 8, 8, device=GPU) * 255 for _ in range(2)]
        draws = [torch.from_numpy(sample_colors(views, view, (0, 0), samples)).to(GPU) for view in range(2)]
        assert all(view.device == GPU for view in jitter_views(images, draws))


def palettes(_: Path) -> None:
    palette = uniform_palette(1).to(GPU)
    nearest_color(images_on_gpu(), palette)
    squared_error(torch.rand(9, 1, device=GPU), palette)


def test_a_gpu_finds_the_nearest_color_without_a_matrix_product(
    fake_cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside bf16 it would be of TF32, which takes one color for another."""
    source = torch.Generator().manual_seed(0)
    pixels, palette = (torch.rand(count, 3, generator=source) * 2 - 1 for count in (5000, 512))
    expected = nearest_rows(pixels, palette)
    assert torch.equal(expected, (pixels[:, None].double() - palette.double()).square().sum(2).argmin(1))
    monkeypatch.setattr(torch, "addmm", None)
    assert torch.equal(nearest_rows(pixels.to(GPU), palette.to(GPU)).cpu(), expected)


def reconstruction(_: Path) -> None:
    encoder = EncoderSettings(image_size=8, channels=1, patch=2, width=16, depth=1, heads=2)
    settings = replace(load_recipe("mae/digits").task, decoder_width=16, decoder_depth=1, decoder_heads=2)
    task = task_class("mae")(settings, encoder, OptimSettings(), RunPlan(4, 2, 8)).to(GPU)
    assert task.figures(batch_of([[8, 8]], channels=1))


EVALUATIONS = {
    "spectrum": spectrum, "attention": pictures_of_attention, "heads": heads, "segmentation": segmentation,
    **{f"probe {name}": by_protocol(name) for name in SHORT},
    "health": without_labels, "pixels": pixels, "colors": colors, "palettes": palettes,
    "reconstruction": reconstruction,
}  # fmt: skip


@pytest.mark.parametrize("name", EVALUATIONS)
def test_what_evaluates_on_a_gpu_mixes_no_devices(name: str, shards: Path, fake_cuda: None) -> None:
    EVALUATIONS[name](shards)


# ---- torch's own rules: fake tensors, with shapes and devices and no values ------------------------------------------

STEPS = {
    "mae": ("mae/vit_tiny_cifar10", {}), "dino": ("dino/digits", TINY_DINO), "igpt": ("igpt/digits", TINY_IGPT),
    "bert": ("igpt/digits", TINY_IGPT | BERT),
    "supervised": ("finetune/small_images", {"task.mixup": 0.0, "task.cutmix": 0.0, "task.erase": 0.0,
                                             "encoder.image_size": 8, "encoder.patch": 4, "encoder.width": 16,
                                             "encoder.depth": 1, "encoder.heads": 2}),
}  # fmt: skip


def batch_of(sizes: list[list[int]], count: int = 8, channels: int = 3) -> Batch:
    numbers = torch.ones(count, dtype=torch.long, device=GPU)
    images = [torch.ones(count, channels, *size, device=GPU) for size in sizes]
    return Batch(images, numbers, numbers, numbers.bool(), torch.ones(count, dtype=torch.long))


def move_to_fake_gpu(task: Task) -> None:
    """Its weights as fake tensors; Module.to would ask the driver."""
    for module in task.modules():
        for name, value in module._parameters.items():
            if value is not None:
                empty = torch.empty(value.shape, dtype=value.dtype, device=GPU)
                module._parameters[name] = torch.nn.Parameter(empty, requires_grad=value.requires_grad)
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device=GPU)


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="torch's own fake GPU needs a torch built for GPUs")
@pytest.mark.parametrize("name", STEPS)
def test_by_torchs_own_rules_the_forward_pass_of_a_step_mixes_no_devices(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # which of its kernels attention takes is asked of the driver
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, k, v, bias=None, is_causal=False, scale=None: (q @ k.mT) @ v
    )
    # its number of counts follows from values
    monkeypatch.setattr(torch, "bincount", lambda colors, minlength: colors.new_zeros(minlength))
    recipe, changes = STEPS[name]
    settings = load_recipe(recipe, changes | {"data.global_batch_size": 8, "train.steps": 9})
    with torch.device("meta"):
        task = task_class(settings.task.name)(
            settings.task.fitted(50, 8, 9, 3), settings.encoder, settings.optim.fitted(6, 9), RunPlan(9, 6, 8),
        )  # fmt: skip
    task.logs_features = True
    views = Views(settings.data.view, settings.encoder.image_size, settings.encoder.interpolation).specs()
    with FakeTensorMode(allow_non_fake_inputs=True):
        move_to_fake_gpu(task)
        batch = batch_of([size for size, _ in views], channels=settings.encoder.channels)
        assert task.training_step(batch, 0).device == GPU
        logged = [value for values in task.logged_features.values() for value in values]
        assert logged
        assert all(value.device == GPU for value in logged)
