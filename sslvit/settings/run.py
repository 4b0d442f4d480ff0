"""Settings of a run, as a recipe in configs/ gives them: optimizer, length, hardware and online evaluation."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from sslvit.files import brief, expand_path
from sslvit.plugins import find_plugin
from sslvit.settings.choices import Choice, check_bounds, checked, not_one_of
from sslvit.settings.data import DataSettings
from sslvit.settings.encoder import EncoderSettings
from sslvit.settings.probe import Precision
from sslvit.settings.task import DINOSettings, IGPTSettings, MAESettings, SupervisedSettings, TaskSettings, Usual

MAX_WARMUP_STEPS = 12_500  # 10 epochs of ImageNet in batches of 1024 (Caron et al. 2021, section 3.2)
MIN_FITTED_STEPS = 10_000  # minimum length that is chosen for a small data set
UNITS = {"d": 86400, "h": 3600, "min": 60, "s": 1}  # in seconds
DURATION = re.compile("".join(rf"(?:(\d+(?:\.\d+)?)\s*{unit}\s*)?" for unit in UNITS))


@dataclass
@checked("optim.")
class OptimSettings:
    """AdamW or Muon, with a learning rate that warms up linearly and then decays, updated every step."""

    name: Literal["adamw", "muon"] = "adamw"
    """Optimizer: adamw, or muon (Jordan et al. 2024) for the matrices of transformer blocks, with AdamW for all else.
    Muon's updates have AdamW's size (Liu et al. 2025), so that learning rate and weight decay can stay as they are. Not
    with train.strategy fsdp.
    """
    base_lr: float | None = 1.5e-4
    """Learning rate at a global batch size of 256; the peak learning rate is base_lr x global_batch_size / 256. null
    for a usual value of the task, with a peak that grows with the square root of the batch size.
    """
    min_lr: float = 0.0
    """Final learning rate of the schedule, reached one step after the last."""
    warmup_epochs: float | None = 40
    """Epochs of linear learning rate warm-up from zero; null for a tenth of the run, at most 12,500 steps. This also
    replaces a warm-up as long as the run.
    """
    lr_schedule: Literal["cosine", "wsd"] = "cosine"
    """Learning rate after the warm-up: half a cosine to min_lr over the rest of the run, or wsd (warmup-stable-decay,
    Hägele et al. 2024): constant, then a cooldown to min_lr along 1 - sqrt, so that one run yields several lengths.
    """
    cooldown_fraction: float = 0.2
    """With wsd, the fraction of the run at the end in which the learning rate decays."""
    weight_decay: float = 0.05
    """Decoupled weight decay of matrices and, in pretraining, also of tokens and position tables; biases, norms and
    scales have none.
    """
    final_weight_decay: float | None = None
    """Weight decay at the end of the run, reached along half a cosine (DINO); null keeps weight_decay."""
    layer_decay: float = 1.0
    """Factor of the learning rate from each block of the encoder to the one before it (He et al. 2022, appendix A.1);
    layers after the encoder have the full rate.
    """
    freeze_encoder_epochs: float | None = 0
    """Epochs at the start in which the encoder keeps the weights of --init while new layers are trained; null for a
    tenth of the run. This also replaces a number as long as the run.
    """
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Coefficients of AdamW's moving averages."""
    clip_grad: float | None = None
    """Maximum gradient norm; null for no clipping."""
    clip_grad_by: Literal["all", "parameter"] = "all"
    """Norm to clip: that of all gradients together, or that of each parameter separately (DINO)."""

    def __post_init__(self) -> None:
        rates = ("base_lr", "min_lr", "warmup_epochs", "weight_decay", "final_weight_decay", "freeze_encoder_epochs")
        check_bounds(self, "optim.", "0 or more", *rates)
        check_bounds(self, "optim.", "in (0, 1]", "layer_decay", "cooldown_fraction")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas: {brief(self.betas)} must be two numbers in [0, 1).")
        if self.clip_grad is not None and not self.clip_grad > 0:
            raise ValueError(f"optim.clip_grad: {self.clip_grad} must be positive; null for no clipping.")

    def fitted(self, steps_per_epoch: int, total_steps: int, base_lr: float | None = None) -> OptimSettings:
        """Replace every null that stands for an automatic choice, and any warm-up or freezing as long as the run.

        Args:
            steps_per_epoch: Optimizer steps in one pass over the data.
            total_steps: Optimizer steps in the run.
            base_lr: Base learning rate if none is given (`Usual.base_lr_at`).
        """
        fitting: dict[str, Any] = {} if self.base_lr is not None else {"base_lr": base_lr}
        if self.warmup_epochs is None or self.warmup_epochs * steps_per_epoch >= max(total_steps, 1):
            fitting["warmup_epochs"] = min(total_steps // 10, MAX_WARMUP_STEPS) / steps_per_epoch
        if self.freeze_encoder_epochs is None or self.freeze_encoder_epochs * steps_per_epoch >= max(total_steps, 1):
            fitting["freeze_encoder_epochs"] = total_steps // 10 / steps_per_epoch
        return replace(self, **fitting) if fitting else self

    def warmup_steps(self, steps_per_epoch: int, total_steps: int) -> int:
        """Number of warm-up steps, at most the length of the run.

        Raises:
            ValueError: warmup_epochs is still null.
        """
        if self.warmup_epochs is None:
            raise ValueError("optim.warmup_epochs: still null. Call OptimSettings.fitted first.")
        return min(round(self.warmup_epochs * steps_per_epoch), total_steps)

    def peak_lr(self, global_batch_size: int) -> float:
        """Learning rate after the warm-up.

        Raises:
            ValueError: base_lr is still null.
        """
        if self.base_lr is None:
            raise ValueError("optim.base_lr: still null. Call OptimSettings.fitted first.")
        return self.base_lr * global_batch_size / 256


def read_duration(text: str) -> float:
    """Read a duration such as 90s, 60min, 1h30min or 2d, in seconds.

    Raises:
        ValueError: Not a duration, or zero.
    """
    found = DURATION.fullmatch(text.strip().lower())
    seconds = sum(float(n or 0) * unit for n, unit in zip(found.groups(), UNITS.values(), strict=True)) if found else 0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"train.budget: {brief(text)} is no time. Give it as 90s, 60min, 8h or 1h30min.")
    return seconds


@dataclass
@checked("train.")
class TrainSettings:
    """Length, hardware and outputs of a run."""

    epochs: float | None = 800
    """Passes over the data, converted once to steps by the size of the data set and the global batch size. null for the
    paper's number, with at least 10,000 steps on a small data set, at most as many images in total as in the paper, and
    on a CPU at most about an hour.
    """
    steps: int | None = None
    """Number of optimizer steps in the run; overrides epochs, and the schedules shrink with it."""
    budget: str | None = None
    """Time from the first step to the last on this machine, such as 60min, 8h or 1h30min, instead of epochs and steps:
    some steps are timed before the run, and one score if it computes any, to choose a number of steps that fits.
    """
    micro_batch_size: int | Literal["auto"] | None = "auto"
    """Number of images per forward pass on one rank; null for all of the rank's images; auto for as many as fit the
    memory of the GPU, as estimated by `sslvit plan`, or the free memory of the machine on a CPU. Gradients of smaller
    micro-batches are accumulated, with the same result up to rounding.
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
    """Distribution over ranks: ddp (each process has all weights) or fsdp (each has a shard of them, FSDP2; for models
    whose weights, gradients and moments do not fit one GPU). Results are the same up to rounding, and a resumed run may
    use the other one.
    """
    timeout_seconds: float = 900
    """Seconds that a process waits for the other processes, also at startup, before the run ends with an error."""
    compile: Literal["auto", "none", "default", "reduce-overhead"] = "auto"
    """Mode of torch.compile for a training step; auto is default on a GPU and none elsewhere. reduce-overhead also
    records the kernels of a step as a CUDA graph, for small models and without accumulation.
    """
    precision: Literal["auto", "float32", "bf16", "float64"] = "auto"
    """Precision of the computation; auto is bf16 where the hardware supports it, otherwise float32."""
    log_every: int = 20
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints; the last step always writes one."""
    skip_limit: int = 10
    """Maximum number of consecutive steps skipped for a non-finite loss or gradient, before the run ends."""
    requeue: bool = True
    """Ask SLURM to requeue the batch job when it is preempted."""
    keep_last: int = 1
    """Number of most recent checkpoints to keep; if it is more than one, they are named by step."""
    keep_every: int | None = None
    """Interval in steps of checkpoints that are kept permanently; null for none."""
    checkpoint_in_background: bool = False
    """Write checkpoints in a background thread, from a copy in memory, while training continues."""
    tensorboard: bool = False
    """Also write the metrics, and the figures at the end, for TensorBoard (tensorboard/ in the run folder)."""
    wandb: str | None = None
    """Project of Weights & Biases to log to as well; null for none. WANDB_MODE=offline needs no account."""
    mlflow: str | None = None
    """Experiment of MLflow to log to as well; null for none. MLFLOW_TRACKING_URI names the server; without it the run
    folder's mlflow/ is written.
    """
    peak_tflops: float | None = None
    """Peak TFLOP/s of each device, for the model FLOPs utilization (mfu) in the metrics; null for the known value of
    the GPU.
    """
    threads: int | None = None
    """Number of CPU threads per process; null for torch's default."""
    deterministic: bool = False
    """Use deterministic kernels on the GPU, which are slower."""

    @property
    def ranks(self) -> int:
        """Total number of processes."""
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
        """Number that every global batch size is a multiple of: one image, or one given micro-batch, on each rank."""
        micro = self.micro_batch_size if isinstance(self.micro_batch_size, int) else 1
        return self.ranks * micro

    def fitted(self, usual: Usual, images: int, steps_per_epoch: int) -> TrainSettings:
        """Choose a length that suits the data set if none is given.

        Args:
            usual: Usual values of the task.
            images: Number of images in the data set.
            steps_per_epoch: Optimizer steps in one pass over them.
        """
        if self.epochs is not None or self.steps is not None:
            return self
        epochs = max(min(usual.epochs, usual.images / images), MIN_FITTED_STEPS / steps_per_epoch)
        return replace(self, epochs=float(f"{epochs:.4g}"))


@dataclass
@checked("online.")
class OnlineSettings:
    """Nearest neighbors and a linear probe on frozen features at regular intervals, without effect on training."""

    train: str | None = None
    """Labeled shards that the neighbors and the linear probe are fitted on; null for no online evaluation."""
    val: str | None = None
    """Labeled shards that the online evaluation scores."""
    every: int = 1000
    """Steps between two online evaluations, rounded up to lines of metrics.jsonl."""
    images: int = 5000
    """Number of images to use from each of the two sets, evenly spaced."""
    neighbors: int = 20
    """Number k of neighbors that vote."""
    precision: Precision = "float32"
    """Precision of the encoder's forward passes, as of `sslvit probe`: bf16 is faster and less exact."""

    def __post_init__(self) -> None:
        if (self.train is None) != (self.val is None):
            raise ValueError("online.train and online.val belong together: give both, or neither.")
        self.train, self.val = (path and expand_path(path) for path in (self.train, self.val))
        check_bounds(self, "online.", "1 or more", "every", "images", "neighbors")


TASK_SETTINGS: dict[str, type[TaskSettings]] = {
    "mae": MAESettings, "dino": DINOSettings, "igpt": IGPTSettings, "supervised": SupervisedSettings,
}  # fmt: skip


def task_settings(name: str) -> type[TaskSettings] | None:
    """The settings dataclass of a plugin's task; None for an unknown name."""
    found = find_task(name)
    return found.settings_class if found else None


def find_task(name: str) -> Any:
    """The task class of a plugin, by import path or registered name; None for an unknown name."""
    found = find_plugin("task.name", name)
    if found is not None and not issubclass(getattr(found, "settings_class", object), TaskSettings):
        raise ValueError(f"task.name: {brief(name)} is no task. Its class must derive from sslvit.tasks.base.Task.")
    return found


TASK_CHOICE = Choice("name", "mae", TASK_SETTINGS, task_settings)


@dataclass
class RunSettings:
    """Everything that determines the result of a run."""

    task: Annotated[TaskSettings, TASK_CHOICE] = field(default_factory=MAESettings)
    """Training task; its name picks the other keys."""
    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    """Architecture and input of the encoder."""
    data: DataSettings = field(default_factory=DataSettings)
    """Training data."""
    optim: OptimSettings = field(default_factory=OptimSettings)
    """Optimizer and schedules."""
    train: TrainSettings = field(default_factory=TrainSettings)
    """Length, hardware and outputs of the run."""
    online: OnlineSettings = field(default_factory=OnlineSettings)
    """Evaluation with labels during pretraining."""
    seed: int = 0
    """Seed of the weights, the order of the data, the crops and the masks."""
    out: str = "runs/new"
    """Run folder."""
    init: str | None = None
    """Encoder whose weights initialize the run; null for random weights."""

    def __post_init__(self) -> None:
        self.out = expand_path(self.out)
        self.init = self.init and expand_path(self.init)
        check_bounds(self, "", "0 or more", "seed")
