"""Which device a run takes, in which precision it computes there, and how much memory a GPU has."""

from __future__ import annotations

import torch

from sslvit.settings.train import TrainSettings


def trains_on_gpu(train: TrainSettings) -> bool:
    """Whether a run takes a GPU; one that asks for it is planned for it on any machine."""
    return train.accelerator == "gpu" or (train.accelerator == "auto" and torch.cuda.is_available())


def precision_of(train: TrainSettings) -> str:
    """float32, bf16 or float64; auto is bf16 where the hardware computes in it, and for a GPU that is not here."""
    if train.precision != "auto":
        return train.precision
    if trains_on_gpu(train):
        has_bf16 = not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if has_bf16 else "float32"
    known: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if known.get("amx_bf16") or known.get("avx512_bf16") else "float32"


def allow_tf32(train: TrainSettings) -> None:
    """Let what autocast leaves in float32 (DINO's prototypes) take TF32 beside bf16, which has fewer digits."""
    if trains_on_gpu(train) and precision_of(train) == "bf16":
        torch.set_float32_matmul_precision("high")


def gpu_memory(devices: int = 1) -> int:
    """Bytes of the smallest of the first GPUs of this machine; 0 where there is none."""
    here = range(min(devices, torch.cuda.device_count() if torch.cuda.is_available() else 0))
    return min((int(torch.cuda.get_device_properties(number).total_memory) for number in here), default=0)
