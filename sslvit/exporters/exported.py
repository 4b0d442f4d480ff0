"""The exported function as one module: images -> tokens, features, logits or MAE's predicted patches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sslvit.checkpoint import HEAD, find_encoder, provenance_of, split_checkpoint
from sslvit.models import ViTEncoder
from sslvit.models.mae import MAEModel
from sslvit.settings import EncoderSettings
from sslvit.sharded_checkpoint import read_checkpoint
from sslvit.tasks.released import HeadsNotStated, load_mae

OUTPUTS = ("tokens", "features", "logits", "reconstruction")
Reopened = Callable[[Tensor], Tensor]
"""An export that runs in its own library: images 'b c h w' -> outputs."""


class Exported(nn.Module):
    """An encoder with its pooling, classifier or decoder.

    Args:
        encoder: The encoder.
        outputs: tokens (the encoder alone), features (pooled), logits (of a classifier) or reconstruction (patches
            predicted by MAE's decoder).
        head: Linear layer from pooled tokens to classes, for logits.
        classes: Names of the classes.
        provenance: Origin of the weights.
        autoencoder: The encoder with MAE's decoder, for reconstruction.
    """

    def __init__(
        self, encoder: ViTEncoder, outputs: str = "features", head: nn.Linear | None = None,
        classes: list[str] | None = None, provenance: dict[str, Any] | None = None,
        autoencoder: MAEModel | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.autoencoder = autoencoder
        self.encoder, self.outputs, self.head = encoder, outputs, head
        self.classes, self.provenance = classes or [], provenance or {}
        self.eval()

    @property
    def settings(self) -> EncoderSettings:
        """The encoder's settings."""
        return self.encoder.settings

    @property
    def mae(self) -> MAEModel:
        """The encoder with MAE's decoder."""
        assert self.autoencoder is not None  # always set for outputs: reconstruction
        return self.autoencoder

    def forward(self, images: Float[Tensor, "b c h w"]) -> Tensor:
        """Tokens 'b t d', features 'b d', logits 'b classes' or predicted patches 'b n pixels'."""
        if self.outputs == "reconstruction":
            grid = self.mae.grid_of(images)
            visible, _ = self.mae.mask(masking_noise(len(images), grid[0] * grid[1]))
            return self.mae.decoder(self.encoder(images, visible), visible, grid).pixels
        if self.outputs == "tokens":
            return self.encoder(images)
        if self.head is None:
            return self.encoder.features(images)
        return self.head(self.encoder.pool(self.encoder(images)))  # as in training (tasks/supervised.py)


def masking_noise(images: int, patches: int) -> Float[Tensor, "b n"]:
    """Fixed random numbers that choose the hidden patches when predictions are compared."""
    return torch.rand(images, patches, generator=torch.Generator().manual_seed(0), device="cpu")


def with_outputs(encoder: ViTEncoder, source: str | Path, outputs: str, weights: str | None = None) -> Exported:
    """An encoder with the classifier or MAE decoder of the run it was loaded from, as `outputs` requires."""
    if outputs not in OUTPUTS:
        raise ValueError(f"--outputs {outputs}: not one of {', '.join(OUTPUTS)}.")
    provenance = provenance_of(source, weights)
    if outputs == "reconstruction":
        try:
            model = load_mae(source)  # encoder and decoder of the same step
        except HeadsNotStated as error:
            raise ValueError(
                f"--outputs reconstruction: {source} is a released file, which does not state its decoder's heads. "
                "Give a run of MAE, or a folder of transformers' ViTMAEForPreTraining."
            ) from error
        return Exported(model.encoder, outputs, provenance=provenance, autoencoder=model)
    if outputs != "logits":
        return Exported(encoder, outputs, provenance=provenance)
    head, classes = read_classifier(source, encoder.settings.width)
    return Exported(encoder, outputs, head, classes, provenance)


def read_classifier(source: str | Path, width: int) -> tuple[nn.Linear, list[str]]:
    """Read the classifier beside an encoder or in a fine-tuned run's checkpoint, and the names of its classes."""
    path = find_encoder(source)
    file = path / HEAD if path.is_dir() else path
    beside = file if path.is_dir() else path.parent.parent / "encoder" / HEAD
    classes: Any = []
    try:
        state = read_checkpoint(file)
        if not path.is_dir():
            state = split_checkpoint(state, path)[2] if "sslvit" in state else {}
        state = {key.removeprefix("head."): value for key, value in state.items() if key.startswith("head.")}
        if beside.is_file():
            with safe_open(beside, "pt") as content:
                classes = json.loads((content.metadata() or {}).get("classes", "[]"))
    except FileNotFoundError:
        state = {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{beside}: the names of its classes are damaged ({error}).") from error
    if not state:
        raise ValueError(f"--outputs logits: {source} has no classifier ({HEAD}). Fine-tune first (sslvit finetune).")
    rows = state["bias"].shape[0] if set(state) == {"weight", "bias"} and state["bias"].ndim == 1 else 0
    if not rows or tuple(state["weight"].shape) != (rows, width):
        shapes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in state.items())
        raise ValueError(f"{file}: no classifier of an encoder of width {width} ({shapes}).")
    if not isinstance(classes, list) or len(classes) not in (0, rows):
        raise ValueError(f"{beside}: names {len(classes)} classes for a classifier of {rows}.")
    head = nn.Linear(width, rows)
    head.load_state_dict(state)
    return head, [str(name) for name in classes]


def save_tensors(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write model.safetensors."""
    contiguous = {key: value.contiguous() for key, value in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", {"format": "pt"})
