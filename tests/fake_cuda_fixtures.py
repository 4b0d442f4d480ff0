"""A GPU that is not there: tensors with real content that lie on `cuda:0` by name.

Arithmetic runs on the CPU, and of each storage it is known where it would lie. An operation that a GPU would refuse
raises what torch raises there: tensors on two devices, or, where repeatable kernels are asked for, a kernel that cannot
be repeated. So whole runs can be walked through, with all that depends on values (losses, norms, spectra, drawn
pixels). It needs no driver, and a torch that is built for CPUs will do.

FakeTensorMode knows torch's own rules, but no values: see test_fake_cuda.py, which takes a step of each task in both.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sslvit.data.resample import _scale_and_shift

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
UNSETTLED = torch.device("meta")  # made inside an operation, which in truth makes it where its inputs lie

aten = torch.ops.aten
MOVES = {aten.copy_.default, aten._to_copy.default, aten.set_.source_Tensor}
TAKES_CPU_INDICES = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
TAKES_NO_SCALARS = {aten.cat.default, aten.stack.default, aten.index_select.default, aten.embedding.default,
                    aten.gather.default, aten.scatter.src}  # fmt: skip
# torch.use_deterministic_algorithms: what raises on a GPU (cumsum up to torch 2.14)
NEVER_REPEATABLE = {
    "adaptive_avg_pool3d_backward", "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward",
    "adaptive_max_pool2d_backward", "avg_pool3d_backward", "fractional_max_pool2d_backward",
    "fractional_max_pool3d_backward", "grid_sampler_2d_backward", "grid_sampler_3d_backward", "histc", "kthvalue",
    "max_unpool2d", "max_unpool3d", "nll_loss2d_forward", "put_", "reflection_pad1d_backward",
    "reflection_pad2d_backward", "reflection_pad3d_backward", "upsample_linear1d_backward",
    "upsample_bilinear2d_backward", "upsample_bicubic2d_backward", "upsample_trilinear3d_backward",
    "_upsample_bilinear2d_aa_backward", "_upsample_bicubic2d_aa_backward", "_ctc_loss_backward",
}  # fmt: skip
NOT_REPEATABLE_ON_FLOATS = {"cumsum", "cumsum_", "cumprod", "logcumsumexp", "_logcumsumexp"}
# what the host learns something from, so that it has to wait until the device is done
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_dim",
         "unique_consecutive", "repeat_interleave", "bincount"}  # fmt: skip
FROM_HOST = {torch.tensor, torch.as_tensor, torch.asarray}


class Whereabouts:
    """Where each storage would lie; those that are not on the CPU are kept alive, so that none takes their place."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[torch.device, torch.UntypedStorage]] = {}
        self.transfers: Counter[str] = Counter()  # from the host to the device, by file and line
        self.waits: Counter[str] = Counter()  # of the host for the device

    def of(self, tensor: torch.Tensor) -> torch.device:
        return self.known[key(tensor)][0] if key(tensor) in self.known else CPU

    def put(self, tensor: torch.Tensor, device: torch.device) -> None:
        if device == CPU:
            self.known.pop(key(tensor), None)
        else:
            self.known[key(tensor)] = (device, tensor.untyped_storage())


def key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def caller() -> str:
    """The innermost line of the package that is being executed."""
    frame = sys._getframe(1)
    while frame is not None and "/sslvit/" not in frame.f_code.co_filename:
        frame = frame.f_back
    return "outside" if frame is None else f"{frame.f_code.co_filename.split('/sslvit/')[-1]}:{frame.f_lineno}"


class _Operations(TorchDispatchMode):
    """What torch's kernels see: refuses what a GPU refuses, and says where results lie."""

    def __init__(self, where: Whereabouts) -> None:
        super().__init__()
        self.where = where

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = tensors(args, kwargs)
        self.check(function, args, given)
        self.count(function, args, kwargs, given)
        result = function(*args, **kwargs)
        places = [self.where.of(value) for value in given]
        place = GPU if GPU in places else CPU if CPU in places else UNSETTLED
        before = {key(value) for value in given}
        for value in tensors(result):
            if key(value) not in before or self.where.of(value) == UNSETTLED:
                self.where.put(value, place)
        return result

    def count(self, function, args: tuple, kwargs: dict, given: list[torch.Tensor]) -> None:
        """Note what moves between host and device, and what the host has to wait for."""
        places = [self.where.of(value) for value in given]
        if GPU not in places:
            return
        name = function.overloadpacket.__name__
        if name == "copy_":
            if places[0] == CPU and not (kwargs.get("non_blocking") or args[2:] == (True,)):
                self.where.waits[caller()] += 1
            elif places[1] == CPU:
                self.where.transfers[caller()] += 1
                if not (kwargs.get("non_blocking") or args[2:] == (True,)):
                    self.where.waits[caller()] += 1
        is_by_mask = function in TAKES_CPU_INDICES and any(index.dtype == torch.bool for index in tensors(args[1]))
        if name in WAITS or is_by_mask:
            self.where.waits[caller()] += 1

    def check(self, function, args: tuple, given: list[torch.Tensor]) -> None:
        places = {self.where.of(value) for value in given}
        if GPU not in places:
            return
        name = function.overloadpacket.__name__
        if torch.are_deterministic_algorithms_enabled():
            is_cumulative = name in NOT_REPEATABLE_ON_FLOATS and given[0].is_floating_point()
            is_weighed = name == "bincount" and len(given) > 1
            if name in NEVER_REPEATABLE or is_cumulative or is_weighed:
                raise RuntimeError(f"{name}_cuda does not have a deterministic implementation")
        if function in MOVES:
            return
        if function in TAKES_CPU_INDICES and self.where.of(args[0]) == GPU:
            given = [args[0], *tensors(args[2:])]
        is_changed_on_cpu = name.endswith("_") and self.where.of(given[0]) == CPU
        strays = [value for value in given
                  if self.where.of(value) == CPU and (value.ndim or function in TAKES_NO_SCALARS)]  # fmt: skip
        if strays or is_changed_on_cpu:
            raise RuntimeError(
                f"{name}: Expected all tensors to be on the same device, but found at least two devices, "
                "cuda:0 and cpu!"
            )


class _Names(TorchFunctionMode):
    """What Python sees: devices by name, in attributes and arguments."""

    def __init__(self, where: Whereabouts) -> None:
        super().__init__()
        self.where = where

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function == torch.Tensor.device.__get__:
            return self.where.of(args[0])
        if function == torch.Tensor.is_cuda.__get__:
            return self.where.of(args[0]) == GPU
        if function is torch.Tensor.cpu:
            return self.move(args[0], CPU)
        if function is torch.Tensor.cuda:
            return self.move(args[0], GPU)
        if function is torch.Tensor.to:
            return self.to(*args, **kwargs)
        if function in (torch.Tensor.numpy, torch.Tensor.__array__) and self.where.of(args[0]) == GPU:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        if function is torch.Tensor.pin_memory:
            return args[0]
        kwargs.pop("pin_memory", None)  # asks the driver
        asked = kwargs.get("device")
        asked = None if asked is None else torch.device(asked)
        if asked is not None:
            if asked.type == "cuda" and kwargs.get("generator") is not None:
                raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
            kwargs["device"] = CPU
        if function is torch.Tensor.tolist and self.where.of(args[0]) == GPU:
            self.where.waits[caller()] += 1
        if function in FROM_HOST and asked is not None and asked.type == "cuda":
            self.where.transfers[caller()] += 1
            self.where.waits[caller()] += 1
        waits = self.where.waits.copy()
        result = function(*args, **kwargs)
        if function is torch.nn.functional.one_hot:  # looks at its labels on a CPU alone
            self.where.waits = waits
        places = [self.where.of(value) for value in tensors(args, kwargs)]
        for value in tensors(result):
            if asked is not None:
                self.where.put(value, GPU if asked.type == "cuda" else CPU)
            elif self.where.of(value) == UNSETTLED:
                self.where.put(value, GPU if GPU in places else CPU)
        return result

    def to(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Tensor.to in all its forms."""
        other = args[0] if args else kwargs.get("other")
        place = self.where.of(tensor)
        if isinstance(other, torch.Tensor):
            place = self.where.of(other)
        elif isinstance(other, (str, torch.device)):
            place = torch.device(other)
            kwargs |= dict(zip(("dtype", "non_blocking", "copy"), args[1:], strict=False))
            args = ()
        elif kwargs.get("device") is not None:
            place = torch.device(kwargs["device"])
        kwargs.pop("device", None)
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        if args or kwargs:
            tensor = torch.Tensor.to(tensor, *args, **kwargs)
        return self.move(tensor, GPU if place.type == "cuda" else CPU, bool(kwargs.get("non_blocking")))

    def move(self, tensor: torch.Tensor, place: torch.device, non_blocking: bool = False) -> torch.Tensor:
        if self.where.of(tensor) == place:
            return tensor
        # torch's optimizers group tensors by where they truly lie, and move their numbers there
        if "/torch/optim/" not in sys._getframe(3).f_code.co_filename:
            if place == GPU:
                self.where.transfers[caller()] += 1
            if place == CPU or not non_blocking:
                self.where.waits[caller()] += 1
        moved = tensor.clone()
        self.where.put(moved, place)
        return moved


@contextmanager
def on_fake_cuda() -> Iterator[Whereabouts]:
    """While this is open, `cuda:0` is a device that tensors can be moved to."""
    where = Whereabouts()
    _scale_and_shift.cache_clear()  # those that lie on another device that is not there, or would remain on this one
    try:
        with ExitStack() as modes:
            modes.enter_context(_Names(where))
            modes.enter_context(_Operations(where))
            yield where
    finally:
        _scale_and_shift.cache_clear()


class _Event:
    """torch.cuda.Event, with the clock of the CPU."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.seconds, self.stream = 0.0, None

    def record(self, stream: Any = None) -> None:
        self.seconds, self.stream = time.perf_counter(), stream

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return False  # the device lags behind

    def elapsed_time(self, later: _Event) -> float:
        return 1000 * (later.seconds - self.seconds)


def take_fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process take the device, and so does what picks one; `train.accelerator` stays cpu for Lightning."""
    monkeypatch.setattr(CPUAccelerator, "setup_device", lambda self, device: None)
    monkeypatch.setattr("sslvit.train.trainer.strategy_of", lambda *_: SingleDeviceStrategy(GPU))
    for module in ("evaluate.probe", "evaluate.layers", "evaluate.dense", "evaluation", "reports.show"):
        monkeypatch.setattr(f"sslvit.{module}.pick_device", lambda name="auto": str(GPU))
    for module in ("linear", "dense"):  # each iteration is like the others, and here they take long
        fit = importlib.import_module(f"sslvit.evaluate.{module}").fit_logistic
        monkeypatch.setattr(f"sslvit.evaluate.{module}.fit_logistic", partial(_fit_briefly, fit))
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"the stream of {device}")


def _fit_briefly(fit: Callable, values, labels, classes, strengths, used=None, *_) -> Any:
    return fit(values, labels, classes, strengths, used, max_iterations=2)


@contextmanager
def repeatable_kernels() -> Iterator[None]:
    """As train.deterministic asks, until this is closed."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def tensors(*values: Any) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]
