"""Optimization: parameter groups, schedules, gradient checks and moving averages."""

from sslvit.optim.ema import ema_update
from sslvit.optim.groups import layer_decay_groups
from sslvit.optim.guard import StepGuard
from sslvit.optim.muon import Muon, check_matrices
from sslvit.optim.schedules import cosine, warmup_cosine, warmup_stable_decay

__all__ = [
    "Muon",
    "StepGuard",
    "check_matrices",
    "cosine",
    "ema_update",
    "layer_decay_groups",
    "warmup_cosine",
    "warmup_stable_decay",
]  # fmt: skip
