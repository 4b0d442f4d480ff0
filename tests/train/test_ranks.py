"""One run is the same on any number of ranks, whether each holds all weights or a part of them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from run_fixtures import BERT, RECIPES, command, losses, metrics, run, run_ranks, same, weights
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import MixedPrecisionPolicy

from sslvit.checkpoint import load_encoder
from sslvit.evaluate.probe import probe
from sslvit.ranks import all_ranks
from sslvit.run_plan import RunPlan
from sslvit.settings import ProbeSettings
from sslvit.settings.load import load_recipe
from sslvit.sharded_checkpoint import read_checkpoint
from sslvit.tasks import task_class
from sslvit.train.fake_step import example
from sslvit.train.folder import RunFolder
from sslvit.train.strategies import Sharded, is_peer_failure, make_strategy, shard
from sslvit.train.timing import Clock
from sslvit.train.trainer import strategy_of

WAYS = {
    "2 ranks, 2 passes": {"train.devices": 2, "train.micro_batch_size": 2},
    "4 ranks": {"train.devices": 4},
    "2 parts": {"train.devices": 2, "train.strategy": "fsdp"},
    "4 parts": {"train.devices": 4, "train.strategy": "fsdp", "encoder.activation_checkpointing": True},
}
FLOAT64 = {"train.precision": "float64"}


def assert_alike(one: RunFolder, two: RunFolder, rel: float = 1e-6) -> None:
    """Loss curve, measures of health, weights, center and teacher."""
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=rel)
        assert a == pytest.approx(b, rel=1e-5)  # measures of health included: RankMe of float32
    for key, value in weights(one).items():
        torch.testing.assert_close(weights(two)[key], value, rtol=rel, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "special", "ways"),
    [
        ("mae/digits", {"optim.clip_grad": 0.5}, ["2 ranks, 2 passes", "4 ranks", "2 parts"]),
        ("dino/digits", {"optim.clip_grad_by": "parameter", "optim.clip_grad": 0.1}, ["2 ranks, 2 passes", "4 parts"]),
        ("dino/digits", {"task.centering": "sinkhorn"}, ["4 ranks"]),  # balanced over the batch of all ranks
        pytest.param("igpt/digits", {}, ["4 ranks", "2 parts"], marks=pytest.mark.smoke),
        ("igpt/digits", BERT, ["2 ranks, 2 passes"]),
    ],
)
def test_ranks_train_as_one(shards: Path, tmp_path: Path, recipe: str, special: dict, ways: list[str]) -> None:
    """The tolerance of a run whose number of ranks changes: 1e-6 in float64."""
    one = run(shards, tmp_path / "one", recipe=recipe, **FLOAT64, **special)
    score = probe_score(shards, one)
    for way in ways:
        other = run_ranks(shards, tmp_path / way, recipe=recipe, **FLOAT64, **special, **WAYS[way])
        assert_alike(one, other)
        assert probe_score(shards, other) == score
        is_exchanged = WAYS[way].get("train.strategy") != "fsdp"  # there it is in forward and backward
        assert all((line["time/communication"] > 0) == is_exchanged for line in other.read_metrics())
        assert (other.figures / "loss.png").exists()


def probe_score(shards: Path, folder: RunFolder) -> dict:
    """Linear and nearest-neighbor scores, images of training as those that are reported."""
    settings = ProbeSettings(str(shards), str(shards), neighbors=[3], cache=None, allow_same_data=True)
    return probe({"it": load_encoder(folder.path)}, settings).to_dict()["rows"]["it"]


LEAVES_THREADS = """
import json, sys
from pathlib import Path
from sslvit.ranks import all_ranks
from sslvit.settings.load import load_recipe
from sslvit.train.run import pretrain

pretrain(load_recipe("mae/digits", json.loads(sys.argv[1])))
print([path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")])
"""


@pytest.mark.slow
@pytest.mark.smoke
def test_a_run_leaves_no_thread_of_its_group(shards: Path, tmp_path: Path) -> None:
    """One that lets go of its last tensors while the interpreter ends aborts the process, once in some dozens."""
    script = tmp_path / "script.py"
    script.write_text(LEAVES_THREADS)
    options = RECIPES["mae/digits"] | {"train.devices": 2, "data.shards": str(shards), "out": str(tmp_path / "run")}
    said = subprocess.run([sys.executable, script, json.dumps(options)], capture_output=True, text=True, timeout=200)
    assert said.returncode == 0, said.stderr
    threads = [line for line in said.stdout.splitlines() if line.startswith("[")]
    assert len(threads) == 2  # one line of each rank
    assert "gloo" not in said.stdout


@pytest.mark.slow
def test_in_float32_a_run_that_changes_its_ranks_agrees_to_a_stated_tolerance(shards: Path, tmp_path: Path) -> None:
    """docs/cluster.md: 1e-3 of each loss over some dozens of steps."""
    whole = run(shards, tmp_path / "whole", **{"train.steps": 40})
    stopped_at(shards, tmp_path / "cut", 8, resume=False, **{"train.steps": 40, "train.devices": 2})
    cut = run_ranks(shards, tmp_path / "cut", "--resume", **{"train.steps": 40, "train.devices": 4})
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-3)


@pytest.mark.slow
def test_a_checkpoint_in_parts_is_one_of_any_other_number_of_ranks(shards: Path, tmp_path: Path) -> None:
    """Two ranks with parts, then three, then two that hold everything, then one: as one that was never stopped."""
    options = {**FLOAT64, "recipe": "dino/digits", "data.global_batch_size": 6, "train.steps": 12}
    whole = run(shards, tmp_path / "whole", **options)
    ways = ({"train.devices": 2, "train.strategy": "fsdp"}, {"train.devices": 3, "train.strategy": "fsdp"},
            {"train.devices": 2}, {"train.devices": 1})  # fmt: skip
    for number, way in enumerate(ways, start=1):
        stop = {"train.steps": 12, "train.checkpoint_every": 3}
        cut = stopped_at(shards, tmp_path / "cut", 3 * number, resume=number > 1, **options | stop | way)
        assert read_checkpoint(cut.checkpoint)["global_step"] >= 3 * number
    assert_alike(whole, cut)
    assert not list((cut.checkpoint.parent / "shards").iterdir())  # nothing names them any longer


def stopped_at(shards: Path, out: Path, step: int, resume: bool, **options) -> RunFolder:
    """A run that is told to stop once it has logged so many steps; it may have ended by then."""
    flags = ["--resume"] if resume else []
    process = subprocess.Popen(command(shards, out, *flags, **options), stderr=subprocess.PIPE, text=True)
    folder, deadline = RunFolder(out), time.monotonic() + 200
    while process.poll() is None and len(folder.read_metrics()) < step:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if step < options["train.steps"] and process.poll() is None:
        process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=200)
    assert process.returncode in (0, 75), said
    return folder


@pytest.mark.slow
@pytest.mark.smoke
def test_a_killed_run_with_parts_goes_on_bit_by_bit(shards: Path, tmp_path: Path) -> None:
    """kill -9 of all ranks, whose threads write; what they had half written is let go, and dropout is as it was."""
    options = {"train.devices": 2, "train.strategy": "fsdp", "encoder.dropout": 0.2, "train.steps": 40,
               "train.checkpoint_every": 3,
               "train.checkpoint_in_background": True, "train.keep_last": 2}  # fmt: skip
    whole = run_ranks(shards, tmp_path / "whole", **options)
    cut = RunFolder(tmp_path / "cut")
    process = subprocess.Popen(command(shards, cut.path, **options), start_new_session=True)
    deadline = time.monotonic() + 200
    while len(cut.read_metrics()) < 17:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    subprocess.run(["pkill", "-9", "-s", str(process.pid)], check=True)
    process.wait()
    run_ranks(shards, cut.path, "--resume", **options)
    assert same(whole, cut)
    names = sorted(path.name for path in cut.checkpoint.parent.iterdir())
    assert names == ["last.ckpt", "shards", "step-00000039.ckpt", "step-00000040.ckpt"]
    parts = sorted((cut.checkpoint.parent / "shards").iterdir())
    assert [path.name[:8] for path in parts] == ["00000039", "00000040"]
    teacher = load_encoder(cut.checkpoint.with_name("step-00000039.ckpt"))
    assert teacher.settings.width == RECIPES["mae/digits"]["encoder.width"]


@pytest.mark.slow
def test_what_looks_at_the_encoder_sees_all_of_it(shards: Path, tmp_path: Path) -> None:
    """Scores while a run trains, with parts as without."""
    options = {"online.train": str(shards), "online.val": str(shards), "online.every": 3, **FLOAT64}
    one = run(shards, tmp_path / "one", **options)
    other = run_ranks(shards, tmp_path / "other", **options, **WAYS["2 parts"])
    scores = [line["probe/linear"] for line in metrics(one) if "probe/linear" in line]
    assert scores == [line["probe/linear"] for line in metrics(other) if "probe/linear" in line]
    assert len(scores) == 3


@pytest.mark.parametrize("owner", ["task", "model"])
def test_weights_outside_of_all_networks_cannot_be_shared_out(monkeypatch: pytest.MonkeyPatch, owner: str) -> None:
    monkeypatch.setattr("sslvit.train.strategies.init_device_mesh", lambda *_: None)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    task = torch.nn.Module()
    task.model = torch.nn.Module()
    (task if owner == "task" else task.model).scale = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="train.strategy: fsdp gathers .*Module holds scale itself.*or use ddp"):
        shard(task, "cpu")


@pytest.mark.parametrize("is_bf16", [True, False])
def test_blocks_alone_are_gathered_in_bf16(monkeypatch: pytest.MonkeyPatch, is_bf16: bool) -> None:
    """Gradients are reduced in float32, and what comes in and goes out stays in it; in float32 nothing changes."""
    settings = load_recipe("dino/digits", RECIPES["dino/digits"])
    task = task_class("dino")(settings.task.fitted(9, 8, 9), settings.encoder, settings.optim, RunPlan(9, 9, 8))
    given = {}
    monkeypatch.setattr("sslvit.train.strategies.init_device_mesh", lambda *_: "mesh")
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(
        "sslvit.train.strategies.fully_shard",
        lambda module, mesh, mp_policy=None: given.update({module: mp_policy or MixedPrecisionPolicy()}),
    )
    shard(task, "cpu", is_bf16)
    in_bf16 = {module for module, policy in given.items() if policy.param_dtype == torch.bfloat16}
    assert in_bf16 == ({*task.model.encoder.blocks, *task.model.teacher.blocks} if is_bf16 else set())
    assert given.keys() - in_bf16 >= {task.model.encoder, task.model.teacher, task.model.head, task.model.teacher_head}
    for module, policy in given.items():
        low = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32, "cast_forward_inputs": False}
        assert policy == MixedPrecisionPolicy(**low if module in in_bf16 else {})


@pytest.mark.filterwarnings("ignore:.*silently drop the pre-backward hook.*")
@pytest.mark.parametrize(("is_bf16", "kept"), [(True, {0}), (False, {4 * 16 * 16 * 2})])
def test_no_copies_of_weights_are_kept_for_the_backward_pass(tmp_path: Path, is_bf16: bool, kept: set[int]) -> None:
    """Of weights gathered in float32 autocast makes copies in bf16, which the backward pass would wait for."""
    settings = load_recipe("mae/digits", RECIPES["mae/digits"])
    task = task_class("mae")(settings.task, settings.encoder, settings.optim, RunPlan(9, 9, 8))
    saved: list[torch.Tensor] = []
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        shard(task, "cpu", is_bf16)
        with saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x), torch.autocast("cpu", torch.bfloat16):
            loss = task.compute(example(settings, 2), 0).objective
        hidden = [x for x in saved if x.shape == (16, 64) and x.dtype == torch.bfloat16]  # fc1, transposed
        assert {x.untyped_storage().nbytes() for x in hidden} == kept
        loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    gradients = [parameter.grad for parameter in task.parameters() if parameter.grad is not None]
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


SAYS_TYPES = """
import json, os, sys
from pathlib import Path
from torch import distributed
from sslvit.cli import main
from sslvit.models.dino import Prototypes
from sslvit.models.transformer import Block

seen = {}

def notes(owner, name, types):
    call = getattr(owner, name)
    def note(*args, **options):
        result = call(*args, **options)
        given = [*args, *options.values()]
        is_training = getattr(given[0], "training", True)  # and no figure is drawn
        for key, value in types(given, result).items() if is_training else ():
            seen.setdefault(key, set()).add(str(value.dtype))
        return result
    setattr(owner, name, note)

for name in ("all_gather_into_tensor", "all_gather_single", "reduce_scatter_tensor", "reduce_scatter_single"):
    if hasattr(distributed, name):  # from torch 2.15 on those of one tensor
        key = "gathered" if name.startswith("all") else "reduced"
        notes(distributed, name, lambda given, result, key=key: {key: given[0]})
notes(Block, "forward", lambda given, result: {"block": given[0].mlp.fc1.weight, "in": given[1], "out": result})
notes(Prototypes, "forward", lambda given, result: {"prototypes": given[0].weight_v, "logits": result})
code = main(sys.argv[1:])
if os.environ["LOCAL_RANK"] == "0":
    Path(os.environ["SEEN"]).write_text(json.dumps({key: sorted(types) for key, types in seen.items()}))
sys.exit(code)
"""


@pytest.mark.slow
def test_parts_in_bf16_train_as_whole_weights_do(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DINO with its moving average: what is gathered, results near those of DDP, and checkpoints that it reads."""
    options = {
        "recipe": "dino/digits", "train.precision": "bf16", "train.devices": 2, "train.steps": 12,
        "train.checkpoint_every": 3, "encoder.activation_checkpointing": True, "encoder.layer_scale": 0.1,
    }  # fmt: skip
    whole = run_ranks(shards, tmp_path / "whole", **options)
    parts = RunFolder(tmp_path / "parts")
    monkeypatch.setenv("SEEN", str(tmp_path / "seen.json"))
    words = command(shards, parts.path, **options, **{"train.strategy": "fsdp"})[3:]
    (tmp_path / "says_types.py").write_text(SAYS_TYPES)
    subprocess.run([sys.executable, str(tmp_path / "says_types.py"), *words], check=True, timeout=400)
    low, full = ["torch.bfloat16"], ["torch.float32"]
    assert json.loads((tmp_path / "seen.json").read_text()) == {
        "gathered": low + full, "reduced": full, "block": low, "in": full, "out": full, "prototypes": full,
        "logits": full,
    }  # fmt: skip
    one, other = weights(whole), weights(parts)
    assert {key: (value.shape, value.dtype) for key, value in one.items()} == {
        key: (value.shape, value.dtype) for key, value in other.items()
    }
    for a, b in zip(metrics(whole), metrics(parts), strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=0.05)
    stopped_at(shards, tmp_path / "cut", 4, resume=False, **options, **{"train.strategy": "fsdp"})
    cut = run_ranks(shards, tmp_path / "cut", "--resume", **options)
    assert losses(cut) == pytest.approx(losses(whole), rel=0.05)


def test_one_process_shares_nothing() -> None:
    settings = load_recipe("mae/digits", {"train.strategy": "fsdp"}).train
    assert strategy_of(settings, Clock()) == "auto"
    settings = load_recipe("mae/digits", {"train.strategy": "fsdp", "train.devices": 2}).train
    assert isinstance(strategy_of(settings, Clock()), Sharded)


def test_ranks_wait_as_long_as_the_settings_say() -> None:
    settings = load_recipe("mae/digits", {"train.devices": 2, "train.timeout_seconds": 5}).train
    assert make_strategy(settings, Clock())._timeout.total_seconds() == 5


def test_gradients_lie_in_the_buckets_that_are_exchanged() -> None:
    settings = load_recipe("mae/digits", {"train.devices": 2, "train.nodes": 3}).train
    assert make_strategy(settings, Clock())._ddp_kwargs["gradient_as_bucket_view"] is True


@pytest.mark.parametrize(("device", "are_exchanged"), [("cpu", True), ("cuda", False)])
def test_buffers_are_exchanged_in_each_step_on_cpus_alone(
    monkeypatch: pytest.MonkeyPatch, device: str, are_exchanged: bool
) -> None:
    """On GPUs running statistics are those of all ranks already. No option that torch deprecates is passed."""
    strategy = make_strategy(load_recipe("mae/digits", {"train.devices": 2}).train, Clock())
    monkeypatch.setattr(type(strategy), "root_device", torch.device(device))
    monkeypatch.setattr(strategy, "determine_ddp_device_ids", lambda: None)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            replica = strategy._setup_model(torch.nn.BatchNorm1d(2))
    finally:
        torch.distributed.destroy_process_group()
    assert replica.broadcast_buffers is are_exchanged


def test_only_the_silence_of_others_is_a_lost_rank() -> None:
    gone = RuntimeError("[gloo/transport/tcp/pair.cc:545] Read error [10.77.0.2]:64151: Connection reset by peer")
    assert is_peer_failure(gone, 2)
    assert is_peer_failure(torch.distributed.DistNetworkError("timed out after 30 s, 1/2 workers joined"), 2)
    assert not is_peer_failure(gone, 1)
    assert not is_peer_failure(RuntimeError("2 unreadable samples; the first: gloo/1.jpg: timed out"), 2)
    assert not is_peer_failure(
        torch.distributed.DistNetworkError("address already in use, the socket cannot listen"), 2
    )
    assert not is_peer_failure(RuntimeError("https://images.example/0.tar: Connection refused"), 2)


def test_each_process_of_an_evaluation_makes_its_gpu_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinned memory and events would be of the first GPU otherwise."""
    made: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", made.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(torch.distributed, name, lambda *_, **__: None)
    for local_rank in ("1", "2"):  # the second has no GPU of its own, and evaluates on the CPU
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        for size in ("1", "3"):
            monkeypatch.setenv("WORLD_SIZE", size)
            with all_ranks():
                pass
    assert made == [1]
