"""The base class of all tasks: the optimizer recipe, schedules, random numbers, records, and Lightning's hooks.

A task is a Lightning module around a model (sslvit/models/mae.py, dino.py, igpt.py, classifier.py). The model
implements the mathematics and knows nothing about training; the task controls steps, random numbers and learning rates.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, TypeVar, cast

import numpy as np
import pytorch_lightning as pl
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sslvit import rng
from sslvit.checkpoint import describe_encoder
from sslvit.data.batch import Batch
from sslvit.environment import keep_freed_memory
from sslvit.files import counted
from sslvit.models import Backbone, Encoder, ViTEncoder
from sslvit.models.backbone import make_encoder
from sslvit.optim import Muon, StepGuard, check_matrices, cosine, layer_decay_groups, warmup_cosine, warmup_stable_decay
from sslvit.run_plan import RunPlan
from sslvit.settings import EncoderSettings, OptimSettings, TaskSettings
from sslvit.tasks.start import adaptable, begin_with
from sslvit.tasks.symptoms import Symptom

M = TypeVar("M", bound=nn.Module)


@dataclass
class StepOutput:
    """The result of a task for one micro-batch.

    Attributes:
        objective: The loss that the optimizer minimizes.
        metrics: Numbers to record, including "loss".
        features: Features of the trained encoder, 'b d', for the health check.
        probs: Probabilities of prototypes, 'b k', for tasks that have prototypes.
        references: Statistics of the targets that determine the loss of a constant prediction, if `Task.logs_features`
            is set; train/callbacks/health.py combines those of all micro-batches and ranks.
    """

    objective: Tensor
    metrics: dict[str, Tensor]
    features: Tensor
    probs: Tensor | None = None
    references: dict[str, Tensor] = field(default_factory=dict)


class Task(pl.LightningModule):
    """A task around one encoder.

    The arguments may be plain dicts, as stored in a checkpoint.

    Args:
        task: Settings of the task; values of null are resolved for the run.
        encoder: Settings of the trained encoder.
        optim: Settings of the optimizer.
        run: Steps, batch sizes, ranks and seed.

    Raises:
        ValueError: A causal encoder with class pooling, where the class token sees no patch, or an encoder that the
            task cannot train.
    """

    settings_class: ClassVar[type[TaskSettings]] = TaskSettings
    view_kinds: ClassVar[tuple[str, ...]] = ("crop", "square", "center", "canvas")  # allowed values of data.view
    spared_from_decay: ClassVar[tuple[str, ...]] = ()  # tokens and position tables without weight decay
    needs_tokens: ClassVar[str | None] = "it trains the vision transformer"  # the reason; None if any network will do
    loss_shows_learning: ClassVar[bool] = True  # whether a loss that does not fall means that nothing is learned
    twice_at_peak: ClassVar[bool] = False  # whether the last step of the warm-up and the next one both have the peak
    model: nn.Module

    def __init__(
        self,
        task: TaskSettings | dict[str, Any],
        encoder: EncoderSettings | dict[str, Any],
        optim: OptimSettings | dict[str, Any],
        run: RunPlan | dict[str, Any],
    ) -> None:
        super().__init__()
        self.run = RunPlan(**run) if isinstance(run, dict) else run
        settings = self.settings_class(**task) if isinstance(task, dict) else task
        self.settings = self.resolve(settings)
        encoder = EncoderSettings(**encoder) if isinstance(encoder, dict) else encoder
        optim = OptimSettings(**optim) if isinstance(optim, dict) else optim
        self.refuse_backbone(encoder)
        base_lr = self.settings.usual.base_lr_at(self.run.global_batch_size)
        self.optim = optim.fitted(self.run.steps_per_epoch, self.run.total_steps, base_lr)
        if encoder.causal and encoder.pooling == "class":
            raise ValueError(
                "encoder.pooling: the class token stands in front of a causal encoder, which sees no patch from there: "
                "all images look alike. Set encoder.causal to false, or encoder.pooling to mean."
            )
        self.save_hyperparameters({"task": asdict(cast(Any, self.settings)), "encoder": asdict(encoder),
                                   "optim": asdict(self.optim), "run": asdict(self.run)})  # fmt: skip
        self.model = self.make_model(encoder)
        self.loss_fn: Callable[..., Any] = cast(Any, self.model).loss  # or its compiled form (train/compilation.py)
        self._freeze_unused_modules()
        self.guard = StepGuard(self.model, self.optim)
        self.warmup_steps = self.optim.warmup_steps(self.run.steps_per_epoch, self.run.total_steps)
        self.peak_lr = self.optim.peak_lr(self.run.global_batch_size)
        # until this step, the health check accepts a network that looks untrained
        self.health_grace_steps = min(self.warmup_steps, self.run.total_steps // 4)
        self.records: dict[str, list[Tensor]] = defaultdict(list)  # of the current step, one entry per micro-batch
        self.logs_features = False  # whether the health check needs the features of the current step
        self.logged_features: dict[str, list[Tensor]] = defaultdict(list)
        self._current_step = -1

    @classmethod
    def refuse_backbone(cls, encoder: EncoderSettings) -> None:
        """Raise ValueError for a network in place of the vision transformer if the task needs tokens."""
        if encoder.backbone is not None and cls.needs_tokens is not None:
            raise ValueError(
                f"encoder.backbone: {encoder.backbone} makes no tokens, and {cls.needs_tokens}. Leave it out, or train "
                "it by DINO (task.name) or with labels (sslvit finetune)."
            )

    # ---- methods that tasks override -------------------------------------------------------------------------

    def make_model(self, encoder: EncoderSettings) -> nn.Module:
        """Make the model. Its `encoder` is trained, and `compute` calls its `loss` as `loss_fn`."""
        raise NotImplementedError

    def compute(self, batch: Batch, step: int) -> StepOutput:
        """The loss of a micro-batch with the random numbers of a step, independent of a Trainer."""
        raise NotImplementedError

    def symptoms(self, measures: dict[str, float]) -> list[Symptom] | None:
        """Symptoms of failure in the measures of one step; None if the task has no such check."""
        return None

    def figures(self, batch: Batch) -> dict[str, tuple[list[str], list[np.ndarray]]]:
        """Figures of the model's predictions for these images: name -> (row titles, rows 'b c h w' in [0, 1]).

        The images and the model are on the device that the run trained on; the rows are arrays.
        """
        return {}

    def extra_weights(self) -> dict[str, Tensor]:
        """Weights to save beside the trained encoder, as head.safetensors; none for pretext tasks."""
        return {}

    def unused_modules(self) -> tuple[str, ...]:
        """Parts of the encoder that this task's training steps do not use; they are frozen where they exist.

        With several ranks, DDP stops the run if a trained parameter gets no gradient; on one rank, weight decay would
        shrink it.
        """
        return ("mask_token",)

    @property
    def trained_encoder(self) -> Encoder:
        """The encoder to save, probe and export."""
        return self.encoder

    # ---- the model -------------------------------------------------------------------------------------------

    @property
    def encoder(self) -> Encoder:
        """The encoder that is trained by gradients."""
        encoder = self.model.encoder
        assert isinstance(encoder, (ViTEncoder, Backbone))
        return encoder

    def resolve(self, settings: TaskSettings) -> TaskSettings:
        """The settings, with every null resolved for the run."""
        run = self.run
        return settings.fitted(run.images_per_epoch, run.global_batch_size, run.total_steps)

    def _freeze_unused_modules(self) -> None:
        names = self.unused_modules()
        for name, parameter in self.encoder.named_parameters():
            if name.startswith(tuple(f"{unused}." for unused in names)) or name in names:
                parameter.requires_grad_(False)

    def gather_full_copy(self) -> Task:
        """The task itself, or, if its weights are sharded over ranks (FSDP2), a copy with the full weights.

        All ranks must call this. Making the copy advances torch's random number generator.
        """
        return self._gather(self, lambda: type(self)(self.settings, self.encoder.settings, self.optim, self.run))

    def gather_trained_encoder(self) -> Encoder:
        """The same for the encoder to score, without the task's other networks."""
        encoder = self.trained_encoder
        return self._gather(encoder, lambda: make_encoder(encoder.settings))

    def _gather(self, module: M, make: Callable[[], M]) -> M:
        weights = module.state_dict()
        if not any(isinstance(value, DTensor) for value in weights.values()):
            return module
        copy = make().to(self.dtype)
        copy.load_state_dict({k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in weights.items()})
        return copy.to(self.device).train(module.training)

    def start_from(self, start: Encoder, source: str) -> None:
        """Start from a trained encoder's weights; differences are adapted and logged (start.py).

        Raises:
            ValueError: The architecture differs, or the weights cannot be adapted.
        """
        begin_with(self.encoder, start, source, adaptable(start.settings))

    # ---- steps -----------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int = 0) -> Tensor:
        """The loss of one micro-batch."""
        output = self.compute(batch, self.global_step)
        for name, value in output.metrics.items():
            self.record(f"train/{name}", value)
        if self.logs_features:
            self._log_features(output)
        return output.objective

    def validation_step(self, batch: Batch, batch_idx: int = 0) -> Tensor:
        """The task's loss on validation images, with the same random numbers every time."""
        images = int(batch.valid.sum())  # none, where a rank's part of the last round is only padding
        if 0 < images < len(batch):
            batch = batch.rows(batch.valid)
        batch.first_row = batch_idx * len(batch)
        output = self.compute(batch, 0)
        metrics = {f"val/{name}": value for name, value in output.metrics.items()}
        self.log_dict(metrics, batch_size=images, sync_dist=self.trainer.world_size > 1)
        return output.metrics["loss"]

    def predict_step(self, batch: Batch, batch_idx: int = 0) -> Tensor:
        """Features 'b d' of a batch's images (of its first view), for `Trainer.predict`."""
        return self.trained_encoder.features(batch.views[0])

    def on_fit_start(self) -> None:
        """Refuse a Trainer that disagrees with the run plan; on a CPU, keep freed memory for the next step.

        Raises:
            ValueError: As in `RunPlan.check_trainer`.
        """
        self.run.check_trainer(self.trainer)
        if self.trainer.strategy.root_device.type == "cpu":
            keep_freed_memory()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Convert plain `(images, labels)` or images, as from other data loaders, to a Batch."""
        return batch if isinstance(batch, Batch) else as_batch(batch)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Prepare a micro-batch: seed torch's generators, and begin a step if it is the first of the step.

        Dropout uses torch's own generators. The seed depends on the step and on the micro-batch's first row in the
        global batch, so that micro-batches and ranks drop different units, and a resumed run drops the same units as
        an uninterrupted one.

        Raises:
            ValueError: The loader's batch size differs from the run plan; only the last batch may be smaller.
        """
        if batch.first_row < 0:
            run, micro_step = self.run, batch_idx % self.run.accumulation_steps
            if len(batch) > run.images_per_pass or (batch_idx == 0 and len(batch) < run.images_per_pass):
                raise ValueError(
                    f"the loader gives {counted(len(batch), 'image')} at a time, but the run plan says "
                    f"{run.images_per_pass} (a global batch of {run.global_batch_size} on {counted(run.ranks, 'rank')} "
                    f"in {counted(run.accumulation_steps, 'pass')}). Set its "
                    f"batch_size={run.images_per_pass}, or plan for another global_batch_size."
                )
            batch.first_row = (self.trainer.global_rank * run.accumulation_steps + micro_step) * run.images_per_pass
            batch.samples = batch.samples + batch.first_row  # which seed random erasing, anew in each step
            batch.epochs = torch.full_like(batch.epochs, self.global_step)
        self.seed_dropout(batch, self.global_step)
        if self._current_step != self.global_step:
            self._current_step = self.global_step
            self.records.clear()
            self.logged_features.clear()
            self.guard.begin_step()

    def seed_dropout(self, batch: Batch, step: int) -> None:
        """Seed torch's generators for the forward pass of a micro-batch."""
        rng.seed_torch(self.run.seed, step, "torch", batch.first_row)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Backpropagate through the guard: if the loss is not finite on any rank, the step is skipped on all."""
        self.guard.backward(loss)

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip as configured, and record the global norm of the gradients of all updated weights before clipping."""
        if self.global_step < self.frozen_encoder_steps:
            for parameter in self.encoder.parameters():
                parameter.grad = None  # so that the optimizer skips it, including moments and weight decay
        self.guard.check_gradients(optimizer, self.global_step + 1)
        assert self.guard.grad_norm is not None
        self.records["train/grad_norm"] = [self.guard.grad_norm]

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """One update at this step's learning rate. Lightning calls this once per global batch, not per micro-batch."""
        step = self.global_step
        lr, weight_decay = self.lr_at(step), self.weight_decay_at(step)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
            group["weight_decay"] = weight_decay if group["decays"] else 0.0
        self.records["lr"] = [torch.tensor(lr, dtype=torch.float64)]
        optimizer.step(closure=optimizer_closure)
        self.zero_grad(set_to_none=True)  # now, and not beside the activations of the next forward pass
        self.guard.end_step()
        self.after_update(step, self.guard.skip)

    def after_update(self, step: int, skip: Tensor) -> None:
        """Further changes once per update, such as a moving average of the weights.

        Args:
            step: Number of the update, counted from zero.
            skip: 1 if the step was skipped, so that nothing may change, else 0; a tensor on the device.
        """

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log the records of a step to Lightning's loggers and callbacks when they are due."""
        trainer = self.trainer
        is_due = self.global_step % cast(Any, trainer).log_every_n_steps == 0 or trainer.is_last_batch
        if not is_due or self.global_step == self._current_step:  # the step has more micro-batches
            return
        metrics = {name: torch.stack([v.to(self.device, torch.float32) for v in values]).mean()
                   for name, values in self.records.items()}  # fmt: skip
        metrics["step"] = torch.tensor(float(self.global_step), device=self.device)  # steps are logged from one
        self.log_dict(metrics, batch_size=len(batch), sync_dist=trainer.world_size > 1)

    # ---- optimizer and schedules -----------------------------------------------------------------------------

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW or Muon; `optimizer_step` sets its learning rates in every step.

        Raises:
            ValueError: Muon cannot train this network (`check_matrices`).
        """
        groups, lr, (first, second) = self.parameter_groups(), self.lr_at(0), self.optim.betas
        if self.optim.name == "adamw":
            return torch.optim.AdamW(groups, lr=lr, betas=(first, second), fused=True)
        check_matrices(self.model)
        return Muon(groups, lr, (first, second))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameter groups by weight decay and by the factor of the learning rate."""
        optim, spared = self.optim, self.spared_from_decay
        named = [
            (name.removeprefix("encoder.") if name.startswith("encoder.") else f"behind.{name}", parameter)
            for name, parameter in self.model.named_parameters()
        ]
        return layer_decay_groups(named, self.encoder.settings.depth, optim.weight_decay, optim.layer_decay, spared,
                                  muon=optim.name == "muon")  # fmt: skip

    @property
    def frozen_encoder_steps(self) -> int:
        """Number of updates at the start in which the encoder is frozen."""
        return round((self.optim.freeze_encoder_epochs or 0) * self.run.steps_per_epoch)

    def lr_at(self, step: int) -> float:
        """Learning rate of update number `step`, counted from zero."""
        curve = self.peak_lr, self.optim.min_lr, self.warmup_steps, self.run.total_steps
        if self.optim.lr_schedule == "wsd":
            return warmup_stable_decay(step, *curve, self.optim.cooldown_fraction * self.run.total_steps)
        return warmup_cosine(step, *curve, twice_at_peak=self.twice_at_peak)

    def weight_decay_at(self, step: int) -> float:
        """Weight decay of update number `step`."""
        if self.optim.final_weight_decay is None:
            return self.optim.weight_decay
        return cosine(step, self.optim.weight_decay, self.optim.final_weight_decay, self.run.total_steps)

    # ---- random numbers --------------------------------------------------------------------------------------

    def uniform(self, purpose: str, batch: Batch, columns: int, step: int) -> Tensor:
        """Uniform random numbers 'b columns': this batch's rows of a table for the global batch of a step."""
        first, device = batch.first_row, batch.views[0].device
        rows = torch.arange(first, first + len(batch), device=device)
        return rng.uniform_on((self.run.seed, step, purpose), rows, columns).float()

    def path_noise(self, batch: Batch, step: int, views: int = 1) -> Tensor | None:
        """Uniform random numbers for stochastic depth, 'branches (views b)'; None without it or in evaluation mode."""
        if not (self.encoder.settings.drop_path and self.training):
            return None
        noise = self.uniform("drop path", batch, views * 2 * self.encoder.settings.depth, step)
        return rearrange(noise, "b (views branches) -> branches (views b)", views=views)

    # ---- records ---------------------------------------------------------------------------------------------

    def record(self, name: str, value: Tensor) -> None:
        """Record a number of this micro-batch; logging averages it over the global batch."""
        self.records[name].append(value.detach().clone())  # the next replay of a CUDA graph may overwrite it

    def _log_features(self, output: StepOutput) -> None:
        """Record the inputs of the health check (train/callbacks/health.py)."""
        logged = self.logged_features
        logged["features"].append(output.features.detach())
        for name, value in output.references.items():
            logged[name].append(value.detach()[None])
        if output.probs is not None:
            entropy = -torch.xlogy(output.probs, output.probs).sum(1)  # b, in nats
            logged["entropy"].append(entropy)
            logged["uniform_kl"].append(math.log(output.probs.shape[1]) - entropy)
            logged["choice"].append(output.probs.argmax(1))

    # ---- checkpoints -----------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the prefix of the trained encoder's weights, and its architecture."""
        names = [name for name, module in self.named_modules() if module is self.trained_encoder]
        checkpoint["sslvit"] = {"encoder": describe_encoder(self.trained_encoder), "prefix": names[0] + "."}


def is_view(value: Any) -> bool:
    """Whether a value is a tensor of images 'b c h w'."""
    return isinstance(value, Tensor) and value.ndim == 4


def as_batch(batch: Any) -> Batch:
    """Make a Batch from images, a list of views, `(images, labels)`, or `(views, labels)` with a list of views."""
    images, labels = batch, None
    if isinstance(batch, Sequence) and len(batch) > 1 and not is_view(batch[1]):
        images, labels = batch[:2]
    elif isinstance(batch, Sequence) and len(batch) == 1:
        images = batch[0]
    views = list(images) if isinstance(images, Sequence) else [images]
    if not all(map(is_view, views)):
        raise ValueError("a batch must be images 'b c h w', (images, labels), or (a list of views, labels).")
    numbers = torch.arange(len(views[0]))
    return Batch(views, labels, numbers, torch.ones_like(numbers, dtype=torch.bool), torch.zeros_like(numbers), -1)
