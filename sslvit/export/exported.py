"""What an export computes, as one module: images -> tokens, features or logits."""

from __future__ import annotations

import json
from pathlib import Path

from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor, nn

from sslvit.checkpoint import HEAD, find_encoder
from sslvit.models import ViTEncoder
from sslvit.settings import EncoderSettings

OUTPUTS = ("tokens", "features", "logits")


class Exported(nn.Module):
    """An encoder and what follows it.

    Args:
        encoder: in evaluation mode.
        outputs: tokens (the encoder alone), features (pooled) or logits (a classifier's).
        head: linear map from features to classes, for logits.
        classes: their names.
    """

    def __init__(
        self,
        encoder: ViTEncoder,
        outputs: str = "features",
        head: nn.Linear | None = None,
        classes: list[str] | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.outputs, self.head, self.classes = encoder, outputs, head, classes or []
        self.eval()

    @property
    def settings(self) -> EncoderSettings:
        return self.encoder.settings

    def forward(self, images: Float[Tensor, "b c h w"]) -> Tensor:
        """'b t d', 'b d' or 'b classes'."""
        if self.outputs == "tokens":
            return self.encoder(images)
        features = self.encoder.features(images)
        return features if self.head is None else self.head(features)


def with_outputs(encoder: ViTEncoder, source: str | Path, outputs: str) -> Exported:
    """The encoder of a source with what is to follow it.

    Args:
        encoder: of the source.
        source: where a fine-tuned run keeps its classifier.
        outputs: tokens, features or logits.

    Raises:
        ValueError: logits of an encoder that has no classifier.
    """
    if outputs not in OUTPUTS:
        raise ValueError(f"--outputs {outputs}: not one of {', '.join(OUTPUTS)}.")
    if outputs != "logits":
        return Exported(encoder, outputs)
    path = find_encoder(source)
    file = (path if path.is_dir() else path.parent.parent / "encoder") / HEAD
    if not file.is_file():
        raise ValueError(f"--outputs logits: {source} has no classifier ({HEAD}). Fine-tune first (sslvit finetune).")
    with safe_open(file, "pt") as weights:
        state = {key.removeprefix("head."): weights.get_tensor(key) for key in weights.keys()}  # noqa: SIM118
        classes = json.loads((weights.metadata() or {}).get("classes", "[]"))
    head = nn.Linear(state["weight"].shape[1], state["weight"].shape[0])
    head.load_state_dict(state)
    return Exported(encoder, outputs, head, classes)
