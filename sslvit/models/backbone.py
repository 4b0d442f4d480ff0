"""A network in the place of the vision transformer: images -> one vector each, and feature maps stage by stage.

It is one of torchvision's or timm's, built by its name without its classifier, or a module from Python.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sslvit.files import printable
from sslvit.models.encoder import ViTEncoder, to_display
from sslvit.models.networks import make_network, stages_of
from sslvit.settings import EncoderSettings
from sslvit.settings.encoder import OWN

POOL = "For feature maps: torch.nn.Sequential(module, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())."


class Backbone(nn.Module):
    """A network that gives one vector per image.

    Args:
        net: The network, without a classifier.
        settings: How it sees images, and its name; None for a module from Python that sees 224 x 224 pixels,
            normalized as ImageNet's.

    Attributes:
        width: Length of the vectors.
        stages: Names of the modules whose feature maps are its layers, from the input on; empty where none are known.

    Raises:
        ValueError: It takes no images of this size, gives something else than one vector each, or has no name.

    Example:
        cnn = sslvit.Backbone(module, sslvit.EncoderSettings(backbone="own", image_size=32))
    """

    net: nn.Module
    settings: EncoderSettings

    def __init__(self, net: nn.Module, settings: EncoderSettings | None = None) -> None:
        super().__init__()
        self.net = net.net if isinstance(net, Backbone) else net
        self.settings = settings or EncoderSettings(backbone=OWN)
        if self.settings.backbone is None:
            raise ValueError("settings: of a vision transformer. Give EncoderSettings(backbone='own', image_size=...).")
        self.stages = stages_of(self.net)
        known = getattr(self.net, "head_hidden_size", None) or getattr(self.net, "num_features", None)  # timm's names
        self.width = known if isinstance(known, int) and self.settings.backbone != OWN else self.measure_width()

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """One vector per image."""
        return self.net(images)

    def features(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """As `forward`, by the name that a ViTEncoder has for it."""
        return self(images)

    def maps(
        self, images: Float[Tensor, "b c h w"], numbers: Sequence[int]
    ) -> tuple[Float[Tensor, "b d"], dict[int, Tensor]]:
        """The vectors, and the feature maps 'b c h w' of some stages, counted from 1, in one pass.

        Raises:
            ValueError: A stage gives something else than feature maps.
        """
        found: dict[int, Tensor] = {}

        def keep(number: int) -> Any:
            return lambda module, inputs, output: found.update({number: output.clone()})  # the next may write over it

        hooks = [self.net.get_submodule(self.stages[one - 1]).register_forward_hook(keep(one)) for one in numbers]
        try:
            vectors = self(images)
        finally:
            for hook in hooks:
                hook.remove()
        for number, output in found.items():
            if not isinstance(output, Tensor) or output.ndim != 4:
                raise ValueError(f"--layer {number}: {self.stages[number - 1]} gives no feature maps 'b c h w'.")
        return vectors, found

    def to_display(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Normalized images as pixels from 0 to 1."""
        return to_display(images, self.settings)

    @torch.no_grad()
    def measure_width(self, size: Sequence[int] | None = None) -> int:
        """The length of the vectors, from a pass over one black image.

        Args:
            size: Height and width; None for those of the settings.

        Raises:
            ValueError: It takes no such images, or gives something else than one vector each.
        """
        height, width = size or self.settings.size
        like = next(self.parameters(), torch.zeros(()))
        try:
            with evaluating(self):
                found = self.net(like.new_zeros(1, self.settings.channels, height, width))
        except Exception as error:  # a network of anybody's may raise anything
            reason = printable(str(error).splitlines()[0], 120) if str(error) else type(error).__name__
            raise ValueError(
                f"encoder.image_size: {self.name} takes no {self.settings.channels} x {height} x {width} "
                f"images ({reason})."
            ) from error
        if not isinstance(found, Tensor) or found.ndim != 2:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"backbone: gives {shape} for one image, and is to give one vector, (1, d). {POOL}")
        return found.shape[1]

    @torch.no_grad()
    def answer(self) -> Float[Tensor, "1 d"]:
        """What it gives, in evaluation mode, for one image with every color: its fingerprint beside the weights."""
        like, shape = next(self.parameters(), torch.zeros(())), (1, self.settings.channels, *self.settings.size)
        image = torch.linspace(-2, 2, math.prod(shape)).view(shape).to(like)
        with evaluating(self):
            return self(image).float()

    @property
    def name(self) -> str:
        """What it is, for a reader."""
        is_from_python = self.settings.backbone == OWN
        return f"{type(self.net).__name__} from Python" if is_from_python else str(self.settings.backbone)

    @property
    def has_twin(self) -> bool:
        """Whether an untrained network of this architecture can be made."""
        return self.settings.backbone != OWN or all(
            hasattr(module, "reset_parameters")
            for module in self.modules()
            if any(module.named_parameters(recurse=False))
        )

    def untrained(self) -> Backbone:
        """A network of this architecture with random weights; those of a module from Python as torch begins."""
        if self.settings.backbone != OWN:
            return Backbone(make_network(self.settings), self.settings)
        twin = copy.deepcopy(self)
        for module in twin.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
        return twin


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """All parts in evaluation mode; afterwards each as before."""
    was_training = {submodule: submodule.training for submodule in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for submodule, training in was_training.items():
            submodule.training = training


Encoder = ViTEncoder | Backbone


def make_encoder(settings: EncoderSettings) -> Encoder:
    """The network that settings describe, with random weights."""
    if settings.backbone is None:
        return ViTEncoder(settings)
    return Backbone(make_network(settings), settings)


def pooled(encoder: Encoder, images: Float[Tensor, "b c h w"], path_noise: Tensor | None = None) -> Tensor:
    """One vector per image 'b d', as training sees it."""
    if isinstance(encoder, Backbone):
        return encoder(images)
    return encoder.pool(encoder(images, path_noise=path_noise))


def require_transformer(encoder: Encoder, what: str) -> ViTEncoder:
    """The encoder itself; ValueError, which names what was asked for, where it is no vision transformer."""
    if isinstance(encoder, Backbone):
        raise ValueError(f"{what}: takes a vision transformer of sslvit, and this is {encoder.name}.")
    return encoder
