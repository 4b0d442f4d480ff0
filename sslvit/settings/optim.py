"""How weights move."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class OptimSettings:
    """AdamW with a rate that warms up linearly and decays along a half cosine, step by step.

    Args:
        base_rate: learning rate at a global batch of 256; the peak rate is base_rate x global_batch / 256.
        min_rate: rate at the last step.
        warmup_epochs: epochs in which the rate rises from zero.
        weight_decay: decoupled decay of matrices; biases, norms and other vectors are spared.
        betas: AdamW's averages.
        clip: largest gradient norm over all weights; null leaves gradients alone.
    """

    base_rate: float = 1.5e-4
    min_rate: float = 0.0
    warmup_epochs: float = 40
    weight_decay: float = 0.05
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    clip: float | None = None

    def __post_init__(self) -> None:
        for key in ("base_rate", "min_rate", "warmup_epochs", "weight_decay"):
            if not 0 <= getattr(self, key) < float("inf"):
                raise ValueError(f"optim.{key}: {getattr(self, key)} is not zero or more.")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas: {self.betas} is not two numbers from 0 up to, not including, 1.")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"optim.clip: {self.clip} is not above zero. Use null for none.")

    def peak_rate(self, global_batch: int) -> float:
        return self.base_rate * global_batch / 256
