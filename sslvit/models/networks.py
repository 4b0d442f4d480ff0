"""Networks in place of the vision transformer: torchvision and timm models by name, and modules from Python."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

from sslvit.environment import require_packages
from sslvit.files import printable
from sslvit.settings import EncoderSettings
from sslvit.settings.encoder import OWN

BackboneLike = nn.Module | Callable[[], nn.Module]
RESNET_STAGES = ["layer1", "layer2", "layer3", "layer4"]
WITH_MORE_CLASSIFIERS = ("googlenet", "inception_v3")  # in torchvision; these also normalize their input again


# ---- modules from Python ---------------------------------------------------------------------------------------

# a context variable: settings are plain values in files, and an argument would have to pass through every function that
# builds networks from settings
_given: ContextVar[Callable[[], nn.Module] | None] = ContextVar("backbone", default=None)


@contextmanager
def given_backbone(backbone: BackboneLike | None) -> Iterator[None]:
    """Within this context, the backbone "own" in settings stands for the given one.

    Args:
        backbone: A module, which is copied before training, or a function that makes one; None changes nothing.
    """
    if backbone is None:
        yield
        return
    maker = (lambda: copy.deepcopy(backbone)) if isinstance(backbone, nn.Module) else backbone
    token = _given.set(maker)
    try:
        yield
    finally:
        _given.reset(token)


def _network_from_python() -> nn.Module:
    maker = _given.get()
    if maker is None:
        raise ValueError(
            "encoder.backbone: own is a module from Python, which no file holds. Give it again: "
            "sslvit.load_encoder(RUN, backbone=module), or backbone= of sslvit.pretrain, finetune and resume."
        )
    net = maker()
    if not isinstance(net, nn.Module):
        raise ValueError(
            f"backbone: made a {type(net).__name__}. Give a torch.nn.Module, or a function that makes one."
        )
    return net


# ---- networks by name ------------------------------------------------------------------------------------------


def make_network(settings: EncoderSettings) -> nn.Module:
    """Build the network named by `settings.backbone`, with random weights and without a classifier.

    Raises:
        ImportError: Its library is not installed.
        ValueError: The library does not know the name, or the network has no classifier or no stem to replace.
    """
    if settings.backbone == OWN:
        return _network_from_python()
    library, _, name = (settings.backbone or "").partition(":")
    net = (_from_torchvision if library == "torchvision" else _from_timm)(name, settings.channels)
    if settings.small_stem:
        replace_stem(net, name)
    return net


def _from_torchvision(name: str, channels: int) -> nn.Module:
    from torchvision import models  # takes seconds to import

    refuse_unknown("torchvision", name, models.list_models(module=models))
    if name in WITH_MORE_CLASSIFIERS:
        raise ValueError(
            f"torchvision:{name}: has further classifiers inside. Take timm:inception_v3, or another network."
        )
    net: nn.Module = models.get_model(name, weights=None)
    classifier = classifier_of(net, name)
    net.num_features = net.get_submodule(classifier).in_features
    net.set_submodule(classifier, nn.Identity())
    if channels != 3:
        first, conv = next((key, module) for key, module in net.named_modules() if isinstance(module, nn.Conv2d))
        net.set_submodule(first, _conv_like(conv, in_channels=channels))
    return net


def classifier_of(net: nn.Module, name: str) -> str:
    """The name of the linear layer at the end of a torchvision network."""
    linear = [key for key, module in net.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError(f"torchvision:{name}: ends in no linear classifier that could be left out. Take another.")
    return linear[-1]


def _from_timm(name: str, channels: int) -> nn.Module:
    require_packages(f"timm:{name}", "sslvit[timm]", "timm")
    import timm

    refuse_unknown("timm", name, timm.list_models())
    return timm.create_model(name, pretrained=False, num_classes=0, in_chans=channels)


def refuse_unknown(library: str, name: str, known: Sequence[str]) -> None:
    """Raise ValueError for a name that the library does not know, suggesting similar names."""
    if name not in known:
        near = difflib.get_close_matches(name[:100], known, n=3)
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        raise ValueError(f"{library}:{printable(name, 60)}: {library} has no such model.{hint}")


def replace_stem(net: nn.Module, name: str) -> None:
    """Give a ResNet the stem for small images: a 3 x 3 convolution of stride 1, and no max pooling."""
    conv, pool = getattr(net, "conv1", None), getattr(net, "maxpool", None)
    if not isinstance(conv, nn.Conv2d) or conv.kernel_size != (7, 7) or pool is None:
        raise ValueError(
            f"encoder.small_stem: {name} has no 7 x 7 convolution and max pooling as a ResNet has. Set it to false."
        )
    net.conv1 = _conv_like(conv, kernel_size=3, stride=1, padding=1)
    net.maxpool = nn.Identity()


def _conv_like(conv: nn.Conv2d, **changes: Any) -> nn.Conv2d:
    """A new convolution like another one, initialized as in torchvision's and timm's ResNets (He et al. 2015)."""
    keys = ("in_channels", "out_channels", "kernel_size", "stride", "padding")
    made = nn.Conv2d(**{key: getattr(conv, key) for key in keys} | changes, bias=conv.bias is not None)
    nn.init.kaiming_normal_(made.weight, mode="fan_out", nonlinearity="relu")
    return made


def stages_of(net: nn.Module) -> list[str]:
    """Names of the last modules of the stages: of a ResNet, torchvision's RegNet, or a timm model with feature_info."""
    if all(hasattr(net, name) for name in RESNET_STAGES):
        return RESNET_STAGES
    if isinstance(trunk := getattr(net, "trunk_output", None), nn.Module):
        return [f"trunk_output.{name}" for name, _ in trunk.named_children()]
    told, known = getattr(net, "feature_info", []), {name for name, _ in net.named_modules() if name}
    if getattr(net, "output_fmt", "NCHW") != "NCHW" or not isinstance(told, list):
        return []
    return [one["module"] for one in told if isinstance(one, dict) and one.get("module") in known]
