"""Count the kernels that a step launches and the bytes that they move, on a machine without a GPU.

    python tools/benchmarks/kernels.py mae/vit_tiny_cifar10 dino/vit_tiny_cifar10 igpt/small_cifar10
    python tools/benchmarks/kernels.py --compiled mae/vit_tiny_cifar10

Tensors have shapes but no content (FakeTensorMode), so any size fits. The second step is counted, since the first
allocates the optimizer's moments. tests/test_device_budget.py counts transfers and waits of the host.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import warnings
from collections import Counter
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch._inductor.utils import run_fw_bw_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sslvit import palette
from sslvit.data.batch import Batch
from sslvit.data.views import Views
from sslvit.models import transformer
from sslvit.optim import ema_update
from sslvit.run_plan import RunPlan
from sslvit.settings.load import load_recipe
from sslvit.tasks import make_task
from sslvit.train.compilation import compile_task
from sslvit.train.fake_step import example

VIEWS = {
    "view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze", "alias",
    "detach", "as_strided", "split", "split_with_sizes", "unbind", "narrow", "reshape", "chunk", "_reshape_alias",
    "lift_fresh", "diagonal", "device", "view_as", "empty", "empty_like", "new_empty", "empty_strided",
    "new_empty_strided",
}  # fmt: skip
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution"}
PER_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36}  # number of lists -> tensors per list in one launch of a multi-tensor kernel


class Count(TorchDispatchMode):
    """Counts kernels by part of the step, and bytes by kind of kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.part = ""
        self.kernels: Counter[str] = Counter()
        self.names: Counter[str] = Counter()
        self.gigabytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        before = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        after = [value for value in tree_leaves(result) if isinstance(value, torch.Tensor)]
        if name in VIEWS or not any(value.ndim for value in before + after):
            return result
        launches = 1
        if name.startswith("_f") and isinstance(args[0], (list, tuple)):  # _foreach and _fused
            lists = sum(isinstance(value, (list, tuple)) for value in args)
            launches = math.ceil(len(args[0]) / PER_LAUNCH.get(lists, 30))
        self.kernels[self.part] += launches
        self.names[name] += launches
        kind = "products" if name in PRODUCTS else "elementwise"
        size = sum(v.numel() * v.element_size() for v in {id(v): v for v in before + after}.values())
        self.gigabytes[kind] += size / 1e9
        return result


def as_on_a_gpu() -> None:
    """Count attention and RMSNorm as one kernel each, and disable branches that depend on values on the host."""
    warnings.simplefilter("ignore")
    F.scaled_dot_product_attention = lambda q, k, v, bias=None, is_causal=False, scale=None: torch.add(q, v)
    F.rms_norm = lambda x, shape, weight, eps=None: torch.mul(x, weight)
    palette.CHUNK_PIXELS = 2**20
    transformer.is_written_out = lambda *_: False
    ema_update.__wrapped__.__globals__["is_on_host"] = lambda _: False  # type: ignore[attr-defined]


def count(recipe: str, images: int, options: dict) -> Count:
    """Count one step of a recipe with a given number of images."""
    settings = load_recipe(recipe, {"data.global_batch_size": images, "train.steps": 1000} | options)
    settings = replace(settings, task=settings.task.fitted(50_000, images, 1000, 10))
    with torch.device("meta"):
        task = make_task(settings, RunPlan(1000, 50, images))
    specs = Views(settings.data.view, settings.encoder.image_size, settings.encoder.interpolation).specs()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in task.modules():
            for name, value in module._parameters.items():
                if value is not None:
                    made = torch.empty(value.shape, device="cpu")
                    module._parameters[name] = torch.nn.Parameter(made, requires_grad=value.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
        task.train()
        optimizer = task.configure_optimizers()
        numbers = torch.zeros(images, dtype=torch.long)
        views = [torch.empty(images, settings.encoder.channels, *size, device="cpu") for size, _ in specs]
        batch = Batch(views, torch.zeros(images, dtype=torch.long, device="cpu"), numbers, numbers.bool(), numbers)
        for step in (0, 1):
            counted = Count()
            with counted:
                counted.part = "begin"
                task.guard.begin_step()
                counted.part = "forward"
                with torch.autocast("cpu", torch.bfloat16):
                    loss = task.training_step(batch, step)
                counted.part = "backward"
                task.guard.backward(loss)
                counted.part = "check"
                task.guard.check_gradients(optimizer, step + 1)
                counted.part = "optimizer"
                optimizer.step()
                optimizer.zero_grad()
                counted.part = "end"
                task.guard.end_step()
                task.after_update(step, task.guard.skip)
    return counted


def count_compiled(recipe: str) -> tuple[int, int]:
    """Count the kernels of a compiled loss and its backward pass: fused kernels, and calls of other kernels.

    Inductor generates this program for a CPU; for a GPU it fuses by the same rules.
    """
    settings = load_recipe(recipe, {"data.global_batch_size": 4, "train.steps": 1000})
    settings = replace(settings, task=settings.task.fitted(50_000, 4, 1000, 10))
    task = make_task(settings, RunPlan(1000, 50, 4))
    compile_task(task, "default")

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return task.compute(example(settings, 4), 0).objective

    fused = called = 0
    for code in run_fw_bw_and_get_code(loss)[1]:
        body = code[code.index("def call(") :]
        fused += len(re.findall(r"^\s+cpp_fused\w*\(", body, re.MULTILINE))
        called += len(re.findall(r"extern_kernels\.\w+\(|torch\.ops\.(?!inductor)[\w.]+\(", body))
    return fused, called


def main(argv: list[str] | None = None) -> int:
    """Print the counts of each recipe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--compiled", action="store_true", help="count what torch.compile makes of the loss instead")
    parser.add_argument("--images", type=int, default=64, help="per step")
    parser.add_argument("--top", type=int, default=8, help="names of kernels that are listed")
    arguments = parser.parse_args(argv)
    as_on_a_gpu()
    if arguments.compiled:
        for recipe in arguments.recipes:
            fused, called = count_compiled(recipe)
            print(
                f"{recipe}, compiled: {fused + called} kernels of forward and backward pass ({fused} fused)", flush=True
            )
        return 0
    print(f"torch {torch.__version__}, bf16, {arguments.images} images a step")
    for recipe in arguments.recipes:
        found = count(recipe, arguments.images, {})
        parts = ", ".join(f"{part} {number}" for part, number in found.kernels.items())
        print(f"\n{recipe}: {found.kernels.total()} kernels ({parts})")
        print(f"  GB: {', '.join(f'{kind} {size:.2f}' for kind, size in found.gigabytes.items())}")
        print(
            f"  most often: {', '.join(f'{name} {number}' for name, number in found.names.most_common(arguments.top))}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
