"""How weights move."""

from sslvit.optim.clip import clip_all, clip_each, norms_of
from sslvit.optim.ema import move_average
from sslvit.optim.groups import decay_groups, layer_decay_groups, layer_of
from sslvit.optim.schedules import cosine, warmup_cosine

__all__ = [
    "clip_all", "clip_each", "cosine", "decay_groups", "layer_decay_groups", "layer_of", "move_average", "norms_of",
    "warmup_cosine",
]  # fmt: skip
