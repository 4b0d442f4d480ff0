"""Settings for sampling images from an autoregressive model."""

from __future__ import annotations

from dataclasses import dataclass

from sslvit.settings.choices import check_bounds

MIN_TEMPERATURE = 0.001  # below this, the likeliest color already has all of the probability


@dataclass
class SampleSettings:
    """Sampling pixel by pixel."""

    temperature: float = 1.0
    """Divisor of the logits; 1 samples from the model as it is, 0 always takes the likeliest color."""
    top_k: int | None = None
    """Number of likeliest colors to sample from; null for all."""
    top_p: float = 1.0
    """Probability of the smallest set of colors to sample from (Holtzman et al. 2020); 1 for all."""
    seed: int = 0
    """Seed of the samples. Image number i gets the same random numbers in any batch."""
    batch: int = 32
    """Number of images to sample in parallel."""

    def __post_init__(self) -> None:
        if self.temperature and not MIN_TEMPERATURE <= self.temperature < float("inf"):
            raise ValueError(
                f"--temperature {self.temperature}: must be 0, or {MIN_TEMPERATURE} or more (1: the model as it is)."
            )
        check_bounds(self, "--", "1 or more", "top_k", "batch")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p {self.top_p}: must be in (0, 1]; 1 for all colors.")
        check_bounds(self, "--", "0 or more", "seed")
