"""A network in place of the vision transformer: images -> one vector each, and feature maps of its stages.

It is a torchvision or timm model, built by name without its classifier, or a module from Python.
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
    """A network that maps each image to one vector.

    Args:
        net: The network, without a classifier.
        settings: Its input and its name; None for a module from Python with 224 x 224 pixels as input, normalized as
            for ImageNet.

    Attributes:
        width: Length of the vectors.
        stages: Names of the modules with the feature maps that count as layers, from input to output; empty if unknown.

    Raises:
        ValueError: It fails on images of this size, does not return one vector per image, or has no name.

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
        """The same as `forward`, under the method name of ViTEncoder."""
        return self(images)

    def maps(
        self, images: Float[Tensor, "b c h w"], numbers: Sequence[int]
    ) -> tuple[Float[Tensor, "b d"], dict[int, Tensor]]:
        """The vectors, and the feature maps 'b c h w' of some stages, counted from 1, in one forward pass.

        Raises:
            ValueError: The output of a stage is not a feature map.
        """
        found: dict[int, Any] = {}

        def keep(number: int) -> Any:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                found[number] = output.clone() if isinstance(output, Tensor) else output  # later layers may be in-place

            return hook

        hooks = [self.net.get_submodule(self.stages[one - 1]).register_forward_hook(keep(one)) for one in numbers]
        try:
            vectors = self(images)
        finally:
            for hook in hooks:
                hook.remove()
        for number in numbers:
            output = found.get(number)  # None if the forward pass does without calling the module
            if not isinstance(output, Tensor) or output.ndim != 4:
                raise ValueError(f"--layer {number}: {self.stages[number - 1]} gives no feature maps 'b c h w'.")
        return vectors, found

    def to_display(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Normalized images as pixels from 0 to 1."""
        return to_display(images, self.settings)

    @torch.no_grad()
    def measure_width(self, size: Sequence[int] | None = None) -> int:
        """The length of the vectors, from a forward pass on one image of zeros.

        Args:
            size: Height and width; None for those of the settings.

        Raises:
            ValueError: It fails on such images, or does not return one vector per image.
        """
        height, width = size or self.settings.size
        device, dtype = device_and_dtype(self)
        image = torch.zeros(1, self.settings.channels, height, width, device=device, dtype=dtype)
        try:
            with evaluating(self):
                found = self.net(image)
        except Exception as error:  # a third-party network may raise anything
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
        """The output in evaluation mode for one fixed image; saved with the weights as a fingerprint."""
        shape = 1, self.settings.channels, *self.settings.size
        image = torch.linspace(-2, 2, math.prod(shape)).view(shape).to(*device_and_dtype(self))
        with evaluating(self):
            return self(image).float()

    @property
    def name(self) -> str:
        """A readable name for messages."""
        is_from_python = self.settings.backbone == OWN
        return f"{type(self.net).__name__} from Python" if is_from_python else str(self.settings.backbone)

    @property
    def why_no_twin(self) -> str | None:
        """Why this architecture cannot be rebuilt with random weights; None if it can."""
        if self.settings.backbone != OWN:
            return None
        fixed = [module for module in self.modules() if not hasattr(module, "reset_parameters")]
        if len(fixed) == len(list(self.modules())):
            return "none of its modules has reset_parameters()"
        if any(any(module.named_parameters(recurse=False)) for module in fixed):
            return "some of its modules have no reset_parameters()"
        return None

    def untrained(self) -> Backbone:
        """The same architecture with random weights; modules from Python are reset by their `reset_parameters`."""
        if self.settings.backbone != OWN:
            return Backbone(make_network(self.settings), self.settings)
        twin = copy.deepcopy(self)
        for module in twin.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
        return twin


def device_and_dtype(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and floating-point type of the parameters, else of the buffers; the CPU and float32 if there are none."""
    tensors = [*module.parameters(), *module.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    return device, next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put all submodules into evaluation mode; afterwards, restore the mode of each."""
    was_training = {submodule: submodule.training for submodule in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for submodule, training in was_training.items():
            submodule.training = training


Encoder = ViTEncoder | Backbone


def make_encoder(settings: EncoderSettings) -> Encoder:
    """Build the network described by the settings, with random weights."""
    if settings.backbone is None:
        return ViTEncoder(settings)
    return Backbone(make_network(settings), settings)


def pooled(encoder: Encoder, images: Float[Tensor, "b c h w"], path_noise: Tensor | None = None) -> Tensor:
    """One vector per image, 'b d', as used in training."""
    if isinstance(encoder, Backbone):
        return encoder(images)
    return encoder.pool(encoder(images, path_noise=path_noise))


def require_transformer(encoder: Encoder, what: str) -> ViTEncoder:
    """Return the encoder if it is a vision transformer, else raise a ValueError that names the requested feature."""
    if isinstance(encoder, Backbone):
        raise ValueError(f"{what}: takes a vision transformer of sslvit, and this is {encoder.name}.")
    return encoder
