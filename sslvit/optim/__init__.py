"""How weights move."""

from sslvit.optim.clip import clip_each
from sslvit.optim.ema import move_average
from sslvit.optim.groups import decay_groups, layer_decay_groups, layer_of
from sslvit.optim.schedules import cosine, warmup_cosine

__all__ = ["clip_each", "cosine", "decay_groups", "layer_decay_groups", "layer_of", "move_average", "warmup_cosine"]
