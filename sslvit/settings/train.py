"""How long, on what, and what is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sslvit.settings.choices import checked


@dataclass
@checked("train.")
class TrainSettings:
    """One run.

    Args:
        epochs: passes over the data; turned into steps once, from the index and the global batch.
        steps: optimizer steps; overrides epochs, and the schedules shrink with it.
        micro_batch_size: images per forward pass on one rank; null for the rank's whole share. Smaller ones are
            accumulated, with the same result up to rounding.
        accelerator: auto, cpu or gpu.
        devices: processes on this machine.
        nodes: machines.
        strategy: ddp: each process holds all weights; fsdp: each holds a part of them (FSDP2), for models whose
            weights, gradients and moments do not fit one GPU. The result is the same up to rounding, and a run that
            goes on may change it.
        timeout_seconds: how long a process waits for the others, also to start, before the run ends with an error.
        compile: torch.compile for the blocks; pays on GPUs.
        precision: auto is bf16 where the hardware computes in it, otherwise float32.
        log_every: steps between two lines of metrics.jsonl.
        checkpoint_every: steps between two checkpoints; the last step always writes one.
        skip_limit: steps in a row that may be skipped, as their loss or gradient is not finite, before the run ends.
        requeue: when preempted as a batch job of SLURM, ask it to run the job again.
        keep_last: checkpoints that stay, the last one included; more than one have names by their step.
        keep_every: checkpoints at multiples of so many steps stay for good; null for none.
        checkpoint_in_background: write checkpoints in a thread while training goes on, from a copy in memory.
        tensorboard: also write the metrics, and the figures at the end, for TensorBoard (tensorboard/ of the run).
        wandb: project of Weights & Biases to log to as well; null for none. WANDB_MODE=offline needs no account.
        peak_tflops: of each device, in TFLOP/s; the metrics say which share of it the model's products use (mfu);
            null for what is known of the GPU by name.
        threads: CPU threads per process; null leaves torch's choice.
        deterministic: repeatable kernels on the GPU, at some cost.
    """

    epochs: float = 800
    steps: int | None = None
    micro_batch_size: int | None = None
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int = 1
    nodes: int = 1
    strategy: Literal["ddp", "fsdp"] = "ddp"
    timeout_seconds: float = 900
    compile: bool = False
    precision: Literal["auto", "float32", "bf16", "float64"] = "auto"
    log_every: int = 20
    checkpoint_every: int = 1000
    skip_limit: int = 10
    requeue: bool = True
    keep_last: int = 1
    keep_every: int | None = None
    checkpoint_in_background: bool = False
    tensorboard: bool = False
    wandb: str | None = None
    peak_tflops: float | None = None
    threads: int | None = None
    deterministic: bool = False

    def __post_init__(self) -> None:
        counts = ("devices", "nodes", "log_every", "checkpoint_every", "keep_last", "keep_every", "skip_limit")
        for key in ("epochs", "steps", "micro_batch_size", "threads", "timeout_seconds", "peak_tflops", *counts):
            value = getattr(self, key)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"train.{key}: {value} is not positive.")
        if self.keep_every is not None and self.keep_every % self.checkpoint_every:
            often = self.checkpoint_every
            raise ValueError(f"train.keep_every: {self.keep_every} is no multiple of train.checkpoint_every ({often}).")
