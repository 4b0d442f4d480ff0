"""How weights move."""

from sslvit.optim.groups import decay_groups, layer_decay_groups, layer_of
from sslvit.optim.schedules import warmup_cosine

__all__ = ["decay_groups", "layer_decay_groups", "layer_of", "warmup_cosine"]
