"""An encoder with a linear head on its pooled tokens, for fine-tuning (He et al. 2022, appendix A.1)."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sslvit.models.backbone import make_encoder, pooled
from sslvit.settings import EncoderSettings

HEAD_STD = 2e-5


class ClassifierLoss(NamedTuple):
    """The result of one forward pass of a Classifier.

    Attributes:
        loss: Cross-entropy in nats.
        features: The head's input, 'b d'.
        logits: The head's output, 'b classes'.
    """

    loss: Tensor
    features: Tensor
    logits: Tensor


class Classifier(nn.Module):
    """An encoder with a linear head.

    Args:
        encoder: The encoder's architecture and input; `pooling` and `fc_norm` determine the head's input.
        classes: Number of classes.
    """

    def __init__(self, encoder: EncoderSettings, classes: int) -> None:
        super().__init__()
        self.encoder = make_encoder(encoder)
        self.head = nn.Linear(self.encoder.width, classes)
        nn.init.trunc_normal_(self.head.weight, std=HEAD_STD)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        """Logits of the classes."""
        return self.head(pooled(self.encoder, images))

    def loss(
        self, images: Float[Tensor, "b c h w"], target: Float[Tensor, "b classes"], smoothing: float,
        path_noise: Tensor | None = None,
    ) -> ClassifierLoss:  # fmt: skip
        """Cross-entropy with label smoothing (Szegedy et al. 2016).

        Args:
            images: Normalized pixels.
            target: Probabilities of the classes; after mixup or CutMix, a mixture of two labels.
            smoothing: Probability mass that is spread evenly over all classes.
            path_noise: Uniform random numbers for stochastic depth, 'branches b'.
        """
        features = pooled(self.encoder, images, path_noise)  # b d
        logits = self.head(features).float()
        return ClassifierLoss(F.cross_entropy(logits, target, label_smoothing=smoothing), features, logits)
