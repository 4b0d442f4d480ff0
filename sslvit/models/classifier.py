"""An encoder and a linear head on its pooled tokens: what fine-tuning trains (He et al. 2022, appendix A.1)."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sslvit.models.encoder import ViTEncoder
from sslvit.settings import EncoderSettings

HEAD_STD = 2e-5


class Classifier(nn.Module):
    """An encoder with a linear head.

    Args:
        encoder: The encoder's architecture and input; its `pooling` and `fc_norm` make the head's input.
        classes: Number of classes.
    """

    def __init__(self, encoder: EncoderSettings, classes: int) -> None:
        super().__init__()
        self.encoder = ViTEncoder(encoder)
        self.head = nn.Linear(encoder.width, classes)
        nn.init.trunc_normal_(self.head.weight, std=HEAD_STD)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        """Logits of the classes."""
        return self.head(self.pooled(images))

    def pooled(self, images: Float[Tensor, "b c h w"], path_noise: Tensor | None = None) -> Float[Tensor, "b d"]:
        """The head's input."""
        return self.encoder.pool(self.encoder(images, path_noise=path_noise))

    def loss(
        self, pooled: Float[Tensor, "b d"], target: Float[Tensor, "b classes"], smoothing: float
    ) -> Float[Tensor, ""]:
        """Cross-entropy with label smoothing (Szegedy et al. 2016).

        Args:
            pooled: The head's input.
            target: Probabilities of the classes; after mixup or CutMix those of two images.
            smoothing: Probability that is spread evenly over all classes.
        """
        return F.cross_entropy(self.head(pooled).float(), target, label_smoothing=smoothing)
