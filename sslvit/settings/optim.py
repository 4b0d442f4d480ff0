"""How weights move."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from sslvit.files import brief
from sslvit.settings.choices import check_bounds, checked

MAX_WARMUP_STEPS = 12_500  # 10 epochs of ImageNet in batches of 1024 (Caron et al. 2021, section 3.2)


@dataclass
@checked("optim.")
class OptimSettings:
    """AdamW with a learning rate that warms up linearly and then decays, step by step."""

    base_lr: float | None = 1.5e-4
    """Learning rate at a global batch size of 256; the peak learning rate is base_lr x global_batch_size / 256. null
    for one that suits the task, with a peak that grows like the square root of the batch size.
    """
    min_lr: float = 0.0
    """Learning rate at the last step."""
    warmup_epochs: float | None = 40
    """Epochs of linear learning rate warm-up from zero; null for a tenth of the run, at most 12,500 steps, which also
    replaces a warm-up as long as the run.
    """
    lr_schedule: Literal["cosine", "wsd"] = "cosine"
    """Learning rate after the warm-up: half a cosine to min_lr over the rest of the run, or wsd (warmup-stable-decay,
    Hägele et al. 2024): constant, and in the cooldown along 1 - sqrt to min_lr, so that one run gives several lengths.
    """
    cooldown_fraction: float = 0.2
    """With wsd, the fraction of the run at its end in which the learning rate decays."""
    weight_decay: float = 0.05
    """Decoupled weight decay of matrices; biases, norms and other vectors have none."""
    final_weight_decay: float | None = None
    """Weight decay at the last step, reached along half a cosine (DINO); null keeps weight_decay."""
    layer_decay: float = 1.0
    """Factor of the learning rate from each block of the encoder to the one before it (He et al. 2022, appendix A.1);
    what stands behind the encoder has the full rate.
    """
    freeze_encoder_epochs: float | None = 0
    """Epochs at the start in which the encoder keeps the weights of --init, while what is new learns; null for a tenth
    of the run, which also replaces a number as long as the run.
    """
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Coefficients of AdamW's moving averages."""
    clip_grad: float | None = None
    """Maximum gradient norm; null for no clipping."""
    clip_grad_by: Literal["all", "parameter"] = "all"
    """Norm that is clipped: that of all gradients together, or of each parameter on its own (DINO)."""

    def __post_init__(self) -> None:
        rates = ("base_lr", "min_lr", "warmup_epochs", "weight_decay", "final_weight_decay", "freeze_encoder_epochs")
        check_bounds(self, "optim.", "0 or more", *rates)
        check_bounds(self, "optim.", "in (0, 1]", "layer_decay", "cooldown_fraction")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas: {brief(self.betas)} must be two numbers in [0, 1).")
        if self.clip_grad is not None and not self.clip_grad > 0:
            raise ValueError(f"optim.clip_grad: {self.clip_grad} must be positive; null for no clipping.")

    def fitted(self, steps_per_epoch: int, total_steps: int, base_lr: float | None = None) -> OptimSettings:
        """The same with every null that stands for a choice, and what would last as long as the run, replaced.

        Args:
            steps_per_epoch: Optimizer steps in one pass over the data.
            total_steps: Optimizer steps in the run.
            base_lr: Learning rate where none is given (`Usual.base_lr_at`).
        """
        fitting: dict[str, Any] = {} if self.base_lr is not None else {"base_lr": base_lr}
        if self.warmup_epochs is None or self.warmup_epochs * steps_per_epoch >= max(total_steps, 1):
            fitting["warmup_epochs"] = min(total_steps // 10, MAX_WARMUP_STEPS) / steps_per_epoch
        if self.freeze_encoder_epochs is None or self.freeze_encoder_epochs * steps_per_epoch >= max(total_steps, 1):
            fitting["freeze_encoder_epochs"] = total_steps // 10 / steps_per_epoch
        return replace(self, **fitting) if fitting else self

    def warmup_steps(self, steps_per_epoch: int, total_steps: int) -> int:
        """Whole steps; fewer than the recipe's where the run is shorter than that.

        Raises:
            ValueError: the warm-up is still to be chosen.
        """
        if self.warmup_epochs is None:
            raise ValueError("optim.warmup_epochs: still null. Call OptimSettings.fitted first.")
        return min(round(self.warmup_epochs * steps_per_epoch), total_steps)

    def peak_lr(self, global_batch_size: int) -> float:
        """Learning rate after the warm-up.

        Raises:
            ValueError: it is still to be chosen.
        """
        if self.base_lr is None:
            raise ValueError("optim.base_lr: still null. Call OptimSettings.fitted first.")
        return self.base_lr * global_batch_size / 256
