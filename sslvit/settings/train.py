"""How long, on what, and what is kept."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from sslvit.files import brief
from sslvit.settings.choices import check_bounds, checked, not_one_of
from sslvit.settings.task import Usual

MIN_FITTED_STEPS = 10_000  # of a run whose length is chosen for a small data set
UNITS = {"d": 86400, "h": 3600, "min": 60, "s": 1}  # in seconds
DURATION = re.compile("".join(rf"(?:(\d+(?:\.\d+)?)\s*{unit}\s*)?" for unit in UNITS))


def read_duration(text: str) -> float:
    """Seconds of a time in words, such as 90s, 60min, 1h30min or 2d.

    Raises:
        ValueError: It is none, or no time at all.
    """
    found = DURATION.fullmatch(text.strip().lower())
    seconds = (
        sum(float(part or 0) * unit for part, unit in zip(found.groups(), UNITS.values(), strict=True)) if found else 0
    )
    if not 0 < seconds < float("inf"):
        raise ValueError(f"train.budget: {brief(text)} is no time. Give it as 90s, 60min, 8h or 1h30min.")
    return seconds


@dataclass
@checked("train.")
class TrainSettings:
    """One run."""

    epochs: float | None = 800
    """Passes over the data, converted to steps once, from the index and the global batch size. null for the paper's,
    for at least 10,000 steps on a small data set, and for no more images in all than the paper's run saw; on a CPU for
    about an hour at most.
    """
    steps: int | None = None
    """Number of optimizer steps in the run; overrides epochs, and the schedules shrink with it."""
    budget: str | None = None
    """Time from the first step to the last on this machine, such as 60min, 8h or 1h30min, in the place of epochs and
    steps: some steps are timed before the run, and as many are taken as end in time.
    """
    micro_batch_size: int | Literal["auto"] | None = "auto"
    """Images per forward pass on one rank; null for all of the rank's images; auto for as many of them as the memory of
    a GPU holds by `sslvit plan`, or, on a CPU, what is free of this machine's. Smaller micro-batches are accumulated,
    with the same result up to rounding.
    """
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Hardware to train on."""
    devices: int | None = None
    """Number of processes on each machine; null for those that a launcher (torchrun, srun) has started, and for one
    without a launcher.
    """
    nodes: int | None = None
    """Number of machines; null for those that a launcher (torchrun, srun) has started, and for one without."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """Distribution over ranks: ddp (each process has all weights) or fsdp (each has a shard of them: FSDP2), for models
    whose weights, gradients and moments do not fit one GPU. The result is the same up to rounding, and a resumed run
    may change it.
    """
    timeout_seconds: float = 900
    """Seconds that a process waits for the others, also at startup, before the run ends with an error."""
    compile: Literal["auto", "none", "default", "reduce-overhead"] = "auto"
    """Mode of torch.compile for the computation of a step; auto is default on a GPU and none elsewhere. reduce-overhead
    also records each step's kernels as a CUDA graph: for small models, and without accumulation.
    """
    precision: Literal["auto", "float32", "bf16", "float64"] = "auto"
    """Precision of the computation; auto is bf16 where the hardware supports it, otherwise float32."""
    log_every: int = 20
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints; the last step always writes one."""
    skip_limit: int = 10
    """Consecutive steps that may be skipped because their loss or gradient is not finite, before the run ends."""
    requeue: bool = True
    """Ask SLURM to requeue the batch job when it is preempted."""
    keep_last: int = 1
    """Number of most recent checkpoints to keep; if it is more than one, they are named by step."""
    keep_every: int | None = None
    """Interval of steps whose checkpoints are kept for good; null for none."""
    checkpoint_in_background: bool = False
    """Write checkpoints in a thread while training goes on, from a copy in memory."""
    tensorboard: bool = False
    """Also write the metrics, and the figures at the end, for TensorBoard (tensorboard/ in the run folder)."""
    wandb: str | None = None
    """Project of Weights & Biases to log to as well; null for none. WANDB_MODE=offline needs no account."""
    mlflow: str | None = None
    """Experiment of MLflow to log to as well; null for none. MLFLOW_TRACKING_URI names the server; without it the run
    folder's mlflow/ is written.
    """
    peak_tflops: float | None = None
    """Peak TFLOP/s of each device, for the model FLOPs utilization (mfu) in the metrics; null for what is known of the
    GPU by name.
    """
    threads: int | None = None
    """CPU threads per process; null leaves torch's choice."""
    deterministic: bool = False
    """Use deterministic kernels on the GPU, at some cost."""

    @property
    def ranks(self) -> int:
        """Number of processes in all."""
        return (self.devices or 1) * (self.nodes or 1)

    def __post_init__(self) -> None:
        counts = ("devices", "nodes", "log_every", "checkpoint_every", "keep_last", "keep_every", "skip_limit")
        more = ("epochs", "steps", "threads", "timeout_seconds", "peak_tflops")
        check_bounds(self, "train.", "positive", *more, *counts)
        if self.budget is not None:
            read_duration(self.budget)
        if not isinstance(self.micro_batch_size, str):
            check_bounds(self, "train.", "positive", "micro_batch_size")
        elif self.micro_batch_size != "auto":
            words = ("auto", "a number", "null")
            raise ValueError(f"train.micro_batch_size: {not_one_of(self.micro_batch_size, words)}")
        if self.keep_every is not None and self.keep_every % self.checkpoint_every:
            often = self.checkpoint_every
            raise ValueError(
                f"train.keep_every: {self.keep_every} must be a multiple of train.checkpoint_every ({often})."
            )

    @property
    def batch_multiple(self) -> int:
        """What every global batch size is a multiple of: one image, or one given micro-batch, on each rank."""
        micro = self.micro_batch_size if isinstance(self.micro_batch_size, int) else 1
        return self.ranks * micro

    def fitted(self, usual: Usual, images: int, steps_per_epoch: int) -> TrainSettings:
        """The same with a length that suits the data set, where none is given.

        Args:
            usual: What suits the task.
            images: Number of images in the data set.
            steps_per_epoch: Optimizer steps in one pass over them.
        """
        if self.epochs is not None or self.steps is not None:
            return self
        epochs = max(min(usual.epochs, usual.images / images), MIN_FITTED_STEPS / steps_per_epoch)
        return replace(self, epochs=float(f"{epochs:.4g}"))
