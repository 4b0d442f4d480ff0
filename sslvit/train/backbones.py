"""Checks before the first step of a run that trains a network other than the vision transformer."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sslvit import rng
from sslvit.models import Backbone, make_encoder
from sslvit.optim import check_matrices
from sslvit.settings import EncoderSettings, RunSettings
from sslvit.settings.encoder import OF_A_BACKBONE
from sslvit.settings.load import leaves
from sslvit.train.hardware import trains_on_gpu

PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def check_backbone(settings: RunSettings, sides: list[int]) -> None:
    """Build the network once, and run it on an image of each size.

    Args:
        settings: Settings of the run.
        sides: Sides of views whose size differs from the encoder's own.

    Raises:
        ImportError: The network's library is not installed.
        ValueError: The network is unknown or cannot take such images, its weights would be sharded over ranks, or
            torch cannot synchronize its batch norms over ranks.
    """
    encoder, train = settings.encoder, settings.train
    if train.strategy == "fsdp" and train.ranks > 1:
        raise ValueError(f"train.strategy: fsdp shards vision transformers, not {encoder.backbone}. Use ddp.")
    with rng.torch_seeded("check"):  # the run's own random numbers stay as they are
        network = make_encoder(encoder)
    assert isinstance(network, Backbone)
    if settings.optim.name == "muon":
        check_matrices(network)
    for size in [encoder.image_size, *([side, side] for side in sides)]:
        network.measure_width(size)
    fused = [module for module in network.modules() if isinstance(module, _BatchNorm) and type(module) not in PLAIN]
    if fused and train.ranks > 1 and trains_on_gpu(train):
        raise ValueError(
            f"train.devices: {encoder.backbone} has batch norms of its own kind ({type(fused[0]).__name__}), which "
            "torch cannot synchronize over ranks. Use one process, or another network."
        )


def refuse_transformer_keys(encoder: EncoderSettings, changes: dict[str, Any]) -> None:
    """Raise ValueError for settings of the vision transformer that are given for another network."""
    for key, _ in leaves(RunSettings, changes):
        section, _, name = key.partition(".")
        if section == "encoder" and name not in OF_A_BACKBONE:
            raise ValueError(f"--{key}: is of the vision transformer, and this is {encoder.backbone}. Leave it out.")
