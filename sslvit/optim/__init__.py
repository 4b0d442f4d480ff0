"""How weights move."""

from sslvit.optim.clip import clip_by_global_norm, clip_by_parameter_norm, grad_norms
from sslvit.optim.ema import ema_update
from sslvit.optim.groups import layer_decay_groups, layer_of
from sslvit.optim.guard import StepGuard
from sslvit.optim.schedules import cosine, warmup_cosine, warmup_stable_decay

__all__ = [
    "StepGuard",
    "clip_by_global_norm",
    "clip_by_parameter_norm",
    "cosine",
    "ema_update",
    "grad_norms",
    "layer_decay_groups",
    "layer_of",
    "warmup_cosine",
    "warmup_stable_decay",
]  # fmt: skip
