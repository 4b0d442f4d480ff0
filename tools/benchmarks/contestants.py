"""One contestant of steps.py in its own process; prints its measurements as one line of JSON.

    python contestants.py '{"who": "lightly", "case": "mae", "precision": "bf16", "steps": 3, "cpu_time": false}'

`ours` is a task in Lightning's Trainer, with its guard, schedules, random numbers and records. A peer follows its own
documentation, in a plain loop. Both use fused AdamW without clipping, and images in memory.
"""

from __future__ import annotations

import copy
import importlib
import json
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WARM_UP = 2  # steps that are not timed: the first allocates the optimizer's moments
SIDE = 4096  # of the square matrices whose product measures the machine's peak rate


@dataclass
class Case:
    """One training step.

    Attributes:
        recipe: Recipe for our run.
        changes: Changes to the recipe.
        batch: Images in a step.
        sides: Side of each square view of an image.
        about: Description for the table.
        peers: Libraries to compare with.
    """

    recipe: str
    changes: dict[str, Any]
    batch: int
    sides: list[int]
    about: str
    peers: list[str] = field(default_factory=list)


CASES = {
    "mae": Case(
        "mae/vit_base_in1k", {"encoder.preset": "vit_small"}, 16, [224], "MAE, ViT-S/16, decoder 8 x 512",
        ["lightly", "transformers"],
    ),
    "dino": Case(
        "dino/own_images", {
            "encoder.drop_path": 0, "optim.clip_grad": None, "data.view.local_crops": 6, "task.freeze_last_layer": 0,
            "task.out_dim": 65536,
        },
        8, [224] * 2 + [96] * 6, "DINO, ViT-S/16, 2 x 224 + 6 x 96, 65,536 prototypes", ["lightly"],
    ),
    "igpt": Case("igpt/small_cifar10", {}, 4, [32], "iGPT, 32 x 32, 8 blocks x 256", ["transformers"]),
}  # fmt: skip
# parameters that only the peer's model has: biases of 8 blocks, and a learned position table where ours is rotary
MORE_PARAMETERS = {("igpt", "transformers"): {"encoder": 8 * 9 * 256 + 1024 * 256, "rest": 0}}


@dataclass
class Peer:
    """A peer's model.

    Attributes:
        modules: "encoder", which corresponds to ours, and "rest".
        loss: Computes the loss of one batch.
        after: Called after the optimizer's step, such as to update a teacher.
    """

    modules: dict[str, nn.Module]
    loss: Callable[[], Tensor]
    after: Callable[[], None] = lambda: None


def views_of(case: Case) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(case.batch, 3, side, side) for side in case.sides]


def autocast(precision: str) -> AbstractContextManager:
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")


# ---- peers -----------------------------------------------------------------------------------------------------------


def lightly_mae(case: Case) -> Peer:
    import timm
    from lightly.models import utils
    from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM

    backbone = MaskedVisionTransformerTIMM(timm.create_model("vit_small_patch16_224", num_classes=0))
    decoder = MAEDecoderTIMM(
        num_patches=196, patch_size=16, embed_dim=384, decoder_embed_dim=512, decoder_depth=8, decoder_num_heads=16
    )
    (images,), length = views_of(case), backbone.sequence_length

    def loss() -> Tensor:
        kept, masked = utils.random_token_mask((case.batch, length), mask_ratio=0.75)
        seen = decoder.embed(backbone.encode(images, idx_keep=kept))
        tokens = utils.repeat_token(decoder.mask_token, (case.batch, length))
        tokens = decoder.decode(utils.set_at_index(tokens, kept, seen.type_as(tokens)))
        predicted = decoder.predict(utils.get_at_index(tokens, masked))
        target = utils.get_at_index(utils.patchify(images, 16), masked - 1)
        return F.mse_loss(predicted, utils.normalize_mean_var(target))

    return Peer({"encoder": backbone, "rest": decoder}, loss)


def lightly_dino(case: Case) -> Peer:
    import timm
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    student = timm.create_model("vit_small_patch16_224", num_classes=0, dynamic_img_size=True)
    head = DINOProjectionHead(384, 2048, 256, 65536)
    teacher, teacher_head = copy.deepcopy(student), DINOProjectionHead(384, 2048, 256, 65536)
    teacher_head.load_state_dict(head.state_dict())
    deactivate_requires_grad(teacher)
    deactivate_requires_grad(teacher_head)
    criterion, views = DINOLoss(65536), views_of(case)

    def loss() -> Tensor:
        with torch.no_grad():
            targets = [teacher_head(teacher(view)) for view in views[:2]]
        return criterion(targets, [head(student(view)) for view in views])

    def after() -> None:
        update_momentum(student, teacher, m=0.996)
        update_momentum(head, teacher_head, m=0.996)

    return Peer({"encoder": student, "rest": head}, loss, after)


def transformers_mae(case: Case) -> Peer:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    model = ViTMAEForPreTraining(ViTMAEConfig(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536, norm_pix_loss=True,
    )).train()  # fmt: skip
    (images,) = views_of(case)
    return Peer({"encoder": model.vit, "rest": model.decoder}, lambda: model(images).loss)


def transformers_igpt(case: Case) -> Peer:
    from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling

    model = ImageGPTForCausalImageModeling(ImageGPTConfig(
        n_embd=256, n_layer=8, n_head=8, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
    )).train()  # fmt: skip
    colors = torch.randint(0, 512, (case.batch, 1024), generator=torch.Generator().manual_seed(0))
    return Peer(
        {"encoder": model.transformer, "rest": model.lm_head}, lambda: model(input_ids=colors, labels=colors).loss
    )


PEERS: dict[tuple[str, str], Callable[[Case], Peer]] = {
    ("lightly", "mae"): lightly_mae, ("lightly", "dino"): lightly_dino,
    ("transformers", "mae"): transformers_mae, ("transformers", "igpt"): transformers_igpt,
}  # fmt: skip


# imported before memory is measured
MODULES = {
    "lightly": ("timm", "lightly.loss", "lightly.models.modules", "lightly.models.utils"),
    "transformers": ("transformers.models.vit_mae.modeling_vit_mae", "transformers.models.imagegpt.modeling_imagegpt"),
}


def run_peer(who: str, case: str, precision: str, steps: int) -> dict[str, Any]:
    for module in MODULES[who]:
        importlib.import_module(module)
    memory = Memory()
    peer = PEERS[who, case](CASES[case])
    parameters = [p for module in peer.modules.values() for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    ends = [time.perf_counter()]
    for _ in range(WARM_UP + steps):
        with autocast(precision):
            loss = peer.loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        peer.after()
        ends.append(time.perf_counter())
    return {"seconds": seconds_of(ends), "parameters": trained(optimizer, peer.modules), **memory.used()}


# ---- ours ------------------------------------------------------------------------------------------------------------


def run_ours(case: str, precision: str, steps: int) -> dict[str, Any]:
    import pytorch_lightning as pl

    from sslvit.run_plan import RunPlan
    from sslvit.settings.load import load_recipe
    from sslvit.tasks import make_task

    work, total = CASES[case], WARM_UP + steps
    settings = load_recipe(work.recipe, work.changes)
    memory = Memory()
    task = make_task(settings, RunPlan(total, total, work.batch))
    views = views_of(work)
    batch = (views if len(views) > 1 else views[0], torch.zeros(work.batch, dtype=torch.long))
    ends = [time.perf_counter()]

    class Times(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            ends.append(time.perf_counter())

    trainer = pl.Trainer(
        accelerator="cpu", max_steps=total, max_epochs=1, precision="bf16-mixed" if precision == "bf16" else "32-true",
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[Times()],
    )  # fmt: skip
    trainer.fit(task, torch.utils.data.DataLoader([batch] * total, batch_size=None))
    rest = nn.ModuleList(child for child in task.model.children() if child is not task.encoder)
    return {
        "seconds": seconds_of(ends),
        "parameters": trained(trainer.optimizers[0], {"encoder": task.encoder, "rest": rest}),
        **memory.used(),
    }


def count_flops(case: str) -> dict[str, float]:
    """FLOPs of the matrix products in one of our steps, with attention counted in full."""
    from sslvit.settings.load import load_recipe
    from sslvit.train.forecast import plan_step

    work = CASES[case]
    settings = load_recipe(work.recipe, {**work.changes, "data.global_batch_size": work.batch, "train.steps": 1})
    return {"flops": float(plan_step(settings, work.batch).flops_per_image * work.batch)}


def product_rate(precision: str) -> dict[str, float]:
    """Floating-point operations per second of one product of large matrices."""
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    one, other = torch.randn(2, SIDE, SIDE).to(kind)
    ends = [time.perf_counter()]
    for _ in range(WARM_UP + 5):
        one @ other
        ends.append(time.perf_counter())
    return {"rate": 2 * SIDE**3 / seconds_of(ends)}


# ---- Lightning's share -----------------------------------------------------------------------------------------------

# two log lines, each after 20 steps as in a run; the first half is warm-up
OVERHEAD_STEPS = 40
OVERHEAD = {
    "encoder.preset": "vit_tiny", "data.view.local_crops": 6, "data.global_batch_size": 8, "data.workers": 0,
    "train.steps": OVERHEAD_STEPS, "train.accelerator": "cpu", "train.log_every": OVERHEAD_STEPS // 2,
    "task.freeze_last_layer": 0, "task.out_dim": 65536, "optim.clip_grad": None,
}  # fmt: skip


def run_pretrain(data: str, out: str, precision: str) -> dict[str, float]:
    """Seconds per step of `sslvit.pretrain`, excluding waits for data."""
    import sslvit

    folder = sslvit.pretrain("dino/own_images", data, out, overwrite=True, **OVERHEAD, **{"train.precision": precision})
    line = json.loads(Path(folder.metrics).read_text().splitlines()[-1])
    return {"seconds": OVERHEAD["data.global_batch_size"] / line["time/images_per_second"] - line["time/data"]}


def run_bare(precision: str) -> dict[str, float]:
    """Seconds of the same step in a bare loop: loss, gradients and AdamW only."""
    from sslvit.environment import keep_freed_memory
    from sslvit.run_plan import RunPlan
    from sslvit.settings.load import load_recipe
    from sslvit.tasks import make_task
    from sslvit.tasks.base import as_batch

    settings = load_recipe("dino/own_images", OVERHEAD)
    case = CASES["dino"]
    task = make_task(settings, RunPlan(OVERHEAD_STEPS, OVERHEAD_STEPS, case.batch))
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=1e-4, fused=True)
    batch = as_batch((views_of(case), torch.zeros(case.batch, dtype=torch.long)))
    batch.first_row = 0
    keep_freed_memory()  # as a run does
    ends = [time.perf_counter()]
    for step in range(OVERHEAD_STEPS):
        with autocast(precision):
            loss = task.compute(batch, step).objective
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ends.append(time.perf_counter())
    return {"seconds": (ends[-1] - ends[OVERHEAD_STEPS // 2]) / (OVERHEAD_STEPS // 2)}


# ---- measurements ----------------------------------------------------------------------------------------------------


class Memory:
    """Resident memory that the process allocates from now on."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        self.before = self._read("VmRSS")

    @staticmethod
    def _read(key: str) -> int:
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
        return 1024 * int(line.split()[1])

    def used(self) -> dict[str, int]:
        """The peak, and the peak without the memory used before the model was made, which is for libraries."""
        return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "peak_of_training": self._read("VmHWM") - self.before}  # fmt: skip


def seconds_of(ends: list[float]) -> float:
    """Median duration of the timed steps."""
    took = [stop - start for start, stop in pairwise(ends)]
    return statistics.median(took[WARM_UP:])


def trained(optimizer: torch.optim.Optimizer, modules: dict[str, nn.Module]) -> dict[str, int]:
    """Number of parameters of each module that received gradients."""
    moved = {id(parameter) for parameter in optimizer.state}
    return {name: sum(p.numel() for p in module.parameters() if id(p) in moved) for name, module in modules.items()}


def main() -> None:
    warnings.simplefilter("ignore")
    request = json.loads(sys.argv[1])
    if request.pop("cpu_time"):
        time.perf_counter = time.monotonic = time.process_time  # for everything in this process
    kinds: dict[str, Callable[..., dict[str, Any]]] = {
        "ours": run_ours, "flops": count_flops, "rate": product_rate, "pretrain": run_pretrain, "bare": run_bare,
    }  # fmt: skip
    who = request.pop("who")
    found = kinds.get(who, partial(run_peer, who))(**request)
    print("\n" + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
