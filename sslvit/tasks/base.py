"""What every pretext task shares: the optimizer recipe, the rate of each step, chance by key, records.

A task writes its own `training_step`; nothing here knows which task it is.
"""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import pytorch_lightning as pl
import torch
from einops import rearrange
from torch import Tensor
from torch.distributed.tensor import DTensor

from sslvit import rng
from sslvit.checkpoint import describe_encoder
from sslvit.data.batch import Batch
from sslvit.models import ViTEncoder
from sslvit.optim import clip_by_global_norm, clip_by_parameter_norm, cosine, decay_groups, grad_norms, warmup_cosine
from sslvit.settings import EncoderSettings, OptimSettings, TaskSettings
from sslvit.tasks.start import begin_with


class Task(pl.LightningModule):
    """A task around one encoder.

    Args:
        settings: of the task.
        encoder: settings of the encoder that is trained.
        optim: how its weights move.
        total_steps: optimizer steps of the whole run.
        steps_per_epoch: optimizer steps per pass over the data; turns epochs of a recipe into steps.
        global_batch_size: images per optimizer step.
        seed: of every chance draw.

    Raises:
        ValueError: an encoder whose class token sees no patch.
    """

    view_kinds: tuple[str, ...] = ("crop", "square", "center", "canvas")  # of data.view: those that make one view

    def __init__(
        self,
        settings: TaskSettings,
        encoder: EncoderSettings,
        optim: OptimSettings,
        total_steps: int,
        steps_per_epoch: int,
        global_batch_size: int,
        seed: int = 0,
    ) -> None:
        if encoder.causal and encoder.pooling == "class":
            raise ValueError(
                "encoder.pooling: the class token stands in front of a causal encoder, which sees no patch from there: "
                "all images look alike. Set encoder.causal to false, or encoder.pooling to mean."
            )
        super().__init__()
        self.settings = settings
        self.encoder = ViTEncoder(encoder)
        self._freeze(self.unused_parts())
        self.optim = optim
        self.total_steps, self.steps_per_epoch, self.global_batch_size = total_steps, steps_per_epoch, global_batch_size
        self.warmup_steps = optim.warmup_steps(steps_per_epoch, total_steps)
        self.peak_lr = optim.peak_lr(global_batch_size)
        self.seed = seed
        self.records: dict[str, list[Tensor]] = defaultdict(list)
        self.young_until = min(self.warmup_steps, total_steps // 4)  # the step up to which it may look like a new one
        self.is_skipped = False  # the last step
        self.not_finite: list[str] = []  # weights with such gradients in it
        self.buffers_before: list[Tensor] = []  # copies of all buffers, made before the step `buffers_step`
        self.buffers_step = -1
        self.is_watched = False
        self.watched: dict[str, list[Tensor]] = defaultdict(list)

    @property
    def trained_encoder(self) -> ViTEncoder:
        """The encoder that is saved, probed and exported."""
        return self.encoder

    def unused_parts(self) -> tuple[str, ...]:
        """Parts of the encoder that no training step of this task passes through; those that it has are frozen.

        On several ranks DDP waits for a gradient of every trained parameter, and one without any stops the run; on one
        rank weight decay would shrink it.
        """
        return ("mask_token",)

    def _freeze(self, parts: tuple[str, ...]) -> None:
        for name, parameter in self.encoder.named_parameters():
            if name.startswith(tuple(f"{part}." for part in parts)) or name in parts:
                parameter.requires_grad_(False)

    def whole(self) -> Task:
        """The task itself, or, where its weights are spread over ranks (FSDP2), a copy with all of them, to look at.

        All ranks must ask for it. The copy draws from torch's stream of chance.
        """
        weights = self.state_dict()
        if not any(isinstance(value, DTensor) for value in weights.values()):
            return self
        copy = type(self)(
            self.settings, self.encoder.settings, self.optim, total_steps=self.total_steps,
            steps_per_epoch=self.steps_per_epoch, global_batch_size=self.global_batch_size, seed=self.seed,
        ).to(self.dtype)  # fmt: skip
        copy.load_state_dict({k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in weights.items()})
        return copy.to(self.device).train(self.training)

    def extra_weights(self) -> dict[str, Tensor]:
        """What is saved beside the trained encoder, as head.safetensors; nothing for pretext tasks."""
        return {}

    def figures(self, batch: Batch) -> dict[str, tuple[list[str], list[np.ndarray]]]:
        """Pictures of what was learned on these images: name -> (row titles, rows 'b c h w' in [0, 1])."""
        return {}

    # ---- weights move ----------------------------------------------------------------------------------------

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameter_groups(), lr=self.lr_at(0), betas=tuple(self.optim.betas), fused=True)

    def parameter_groups(self) -> list[dict]:
        """Which weights decay, and by which share of the rate they move."""
        return decay_groups(self, self.optim.weight_decay)

    def lr_at(self, step: int) -> float:
        """Learning rate of the update number `step`, counted from zero."""
        return warmup_cosine(step, self.peak_lr, self.optim.min_lr, self.warmup_steps, self.total_steps)

    def weight_decay_at(self, step: int) -> float:
        """Weight decay of the update number `step`."""
        if self.optim.final_weight_decay is None:
            return self.optim.weight_decay
        return cosine(step, self.optim.weight_decay, self.optim.final_weight_decay, self.total_steps)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer, optimizer_closure=None) -> None:
        """One update at the rate of this step. Lightning calls this once per global batch, not per micro-batch."""
        rate, decay = self.lr_at(self.global_step), self.weight_decay_at(self.global_step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
            group["weight_decay"] = decay if group["decays"] else 0.0
        self.records["lr"] = [torch.tensor(rate, dtype=torch.float64)]
        optimizer.step(closure=optimizer_closure)
        self.zero_grad(set_to_none=True)  # now, and not beside the activations of the next forward pass
        if self.is_skipped:
            self.restore_buffers()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Prepare a micro-batch: key torch's random numbers, and copy the buffers before the first one of a step.

        Dropout draws from torch's own generators. The key names the step and the micro-batch's first row in the global
        batch, so micro-batches and ranks drop different units, and a resumed run drops those of one that never stopped.
        """
        rng.seed_torch(self.seed, self.global_step, "torch", batch.first_row)
        if self.buffers_step != self.global_step:
            self.buffers_step = self.global_step
            self.copy_buffers()

    @torch.no_grad()
    def copy_buffers(self) -> None:
        """Keep the buffers as they are now: running statistics of batch norm, DINO's center."""
        buffers = list(self.buffers())
        if len(self.buffers_before) != len(buffers):
            self.buffers_before = [buffer.clone() for buffer in buffers]
        elif buffers:
            torch._foreach_copy_(self.buffers_before, buffers)

    @torch.no_grad()
    def restore_buffers(self) -> None:
        """Undo what the forward passes of a skipped step changed in the buffers."""
        if self.buffers_before:
            torch._foreach_copy_(list(self.buffers()), self.buffers_before)

    def backward(self, loss: Tensor, *args, **kwargs) -> None:
        """A loss that is not finite makes every gradient so, on every rank, and the step is skipped."""
        loss.backward(torch.where(loss.detach().isfinite(), 1.0, math.nan).to(loss), *args, **kwargs)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """Clip where the recipe says so, and record the norm over all weights before that.

        Where it is not finite the optimizer finds no gradients: weights, moments and decay stay as they were.
        """
        gradients = {name: p.grad for name, p in self.named_parameters() if p.grad is not None}
        norms = grad_norms(list(gradients.values()))  # the same on every rank, and so is what follows from them
        if self.optim.clip_grad:
            clip = clip_by_parameter_norm if self.optim.clip_grad_by == "parameter" else clip_by_global_norm
            clip(list(gradients.values()), norms, self.optim.clip_grad)
        self.records["grad_norm"] = [norms.norm()]
        self.is_skipped = not bool(norms.norm().isfinite())
        self.not_finite = []
        if self.is_skipped:
            self.not_finite = [name for name, norm in zip(gradients, norms.tolist(), strict=True)
                               if not math.isfinite(norm)]  # fmt: skip
            self.zero_grad(set_to_none=True)

    # ---- chance ----------------------------------------------------------------------------------------------

    def uniform(self, purpose: str, batch: Batch, columns: int) -> Tensor:
        """Uniform numbers 'b columns' for this step: the batch's rows of one table for the whole global batch."""
        rows = batch.first_row + np.arange(len(batch))
        table = rng.uniform((self.seed, self.global_step, purpose), rows, columns)
        return torch.from_numpy(table.astype(np.float32)).to(batch.samples.device)

    def path_noise(self, batch: Batch, views: int = 1) -> Tensor | None:
        """Numbers for stochastic depth, 'branches (views b)', or None where the encoder has none."""
        if not self.encoder.settings.drop_path:
            return None
        noise = self.uniform("drop path", batch, views * 2 * self.encoder.settings.depth)
        return rearrange(noise, "b (views branches) -> branches (views b)", views=views)

    # ---- records ---------------------------------------------------------------------------------------------

    def record(self, name: str, value: Tensor) -> None:
        """Keep a number of this micro-batch; the run log averages it over the global batch when a line is due."""
        self.records[name].append(value.detach())

    def watch(self, features: Tensor, shares: Tensor | None = None) -> None:
        """Show what this micro-batch made to the health check, in steps that it looks at (train/health.py).

        Args:
            features: 'b d', of the encoder that is trained.
            shares: 'b k', of the prototypes, where the task has some.
        """
        if not self.is_watched:
            return
        self.watched["features"].append(features.detach())
        if shares is not None:
            entropy = -torch.xlogy(shares, shares).sum(1)  # b, in nats
            self.watched["entropy"].append(entropy)
            self.watched["uniform_kl"].append(math.log(shares.shape[1]) - entropy)
            self.watched["choice"].append(shares.argmax(1))

    def start_from(self, start: ViTEncoder, source: str) -> None:
        """Begin with a trained encoder's weights; what is not as it was is said (start.py).

        Raises:
            ValueError: it is of another architecture.
        """
        begin_with(self.encoder, start, source)

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Tell Lightning's counters how many micro-batches the steps done are now.

        They are saved as they were, but a run may go on with other micro-batches, or with more steps than it had.
        """
        done = checkpoint["global_step"] * self.trainer.accumulate_grad_batches
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for count in ("total", "current"):
            progress[count] |= {"ready": done, "started": done, "processed": done, "completed": done - 1}
        progress["is_last_batch"] = False

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        names = [name for name, module in self.named_modules() if module is self.trained_encoder]
        checkpoint["sslvit"] = {
            "encoder": describe_encoder(self.trained_encoder),
            "prefix": names[0] + ".",
        }
