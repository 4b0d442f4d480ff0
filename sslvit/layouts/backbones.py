"""torchvision and timm networks other than plain vision transformers, by name, with their preprocessing.

    torchvision:resnet18                    random weights
    torchvision:resnet18@IMAGENET1K_V1      weights downloaded by torchvision
    timm:resnet18.a1_in1k                   weights downloaded by timm
    torchvision:resnet18@weights.pth        a local file, also for timm

Nothing is downloaded unless weights are named.
"""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslvit import rng
from sslvit.environment import require_packages
from sslvit.files import expand_path, printable
from sslvit.layouts import timm_models
from sslvit.layouts.preprocessing import describe_preprocessing, from_timm
from sslvit.layouts.unwrap import unwrap
from sslvit.layouts.vit import Converted
from sslvit.models.networks import classifier_of, make_network, refuse_unknown
from sslvit.settings import EncoderSettings
from sslvit.settings.encoder import OF_A_BACKBONE
from sslvit.weight_files import read_torch_file

logger = logging.getLogger(__name__)

PREFIX = "net."  # of a Backbone's weights
OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])(?=\.)")  # norm.1 in its files is norm1 in its code
COUNTER = "num_batches_tracked"  # a buffer of batch norms that weights of early torch versions lack


def is_name(source: str) -> bool:
    """Whether a source names a torchvision network, or a timm network other than a plain vision transformer."""
    library, _, name = source.partition(":")
    if library != "timm":
        return library == "torchvision"
    require_packages(source, "sslvit[timm]", "timm")
    import timm

    architecture = name.partition("@")[0].partition(".")[0]
    return timm.is_model(architecture) and not timm.models.is_model_in_modules(architecture, timm_models.MODULES)


def has_weights(source: str) -> bool:
    """Whether the name of a network also names weights; otherwise, weights are random."""
    name = source.partition(":")[2]
    return "@" in name or "." in name


def from_name(source: str, **changes: Any) -> Converted:
    """Convert a network by name, with its weights, to the settings and state dict of a Backbone.

    Args:
        source: The name, as in this module's docstring.
        changes: Settings of its input, and `small_stem`.

    Raises:
        ImportError: timm is not installed.
        ValueError: The network is unknown, weights are unavailable or do not fit, or a setting does not apply to it.
        FileNotFoundError: The file of weights does not exist.
    """
    wrong = [key for key in changes if key not in OF_A_BACKBONE]
    if wrong:
        raise ValueError(f"{printable(source)}: {wrong[0]} is of vision transformers and released files. Leave it out.")
    library, _, rest = source.partition(":")
    name, _, weights = rest.partition("@")
    open_network = _from_torchvision if library == "torchvision" else _from_timm
    return open_network(name, weights, changes)


def _from_torchvision(name: str, weights: str, changes: dict[str, Any]) -> Converted:
    from torchvision import models  # takes seconds to import

    refuse_unknown("torchvision", name, models.list_models(module=models))
    known = models.get_model_weights(name)
    tag = known[weights] if weights in known.__members__ else None
    seen = (tag or known.DEFAULT).transforms()
    prepared = {
        "image_size": list(seen.crop_size) * (2 // len(seen.crop_size)), "mean": list(seen.mean), "std": list(seen.std),
        "interpolation": seen.interpolation.value, "crop_fraction": min(1.0, seen.crop_size[0] / seen.resize_size[0]),
    }  # fmt: skip
    settings = EncoderSettings(**{"backbone": f"torchvision:{name}", **prepared, **changes})
    source, tags = f"torchvision:{name}@{weights}", ", ".join(one.name for one in known)
    classifier = classifier_of(models.get_model(name, weights=None), name) if weights else ""
    if tag is None:
        return _without_download(source, settings, weights, f"torchvision's are {tags}", classifier)
    return _converted(settings, read_torch_file(_downloaded(tag.url, source)), classifier, source)


def _downloaded(url: str, source: str) -> Path:
    """The file of an address in torch's cache, downloaded if necessary."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not file.is_file():
        logger.info(f"{source}: downloading {url}")
        checksum = torch.hub.HASH_REGEX.search(file.name)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file), checksum[1] if checksum else None, progress=False)
        except (OSError, RuntimeError) as error:  # no network, a full disk, or a wrong checksum
            raise ValueError(
                f"{source}: its weights are not in {file.parent}, and cannot be downloaded ({printable(error, 120)}). "
                f"Get {url} where there is a network, and give the file: {source.partition('@')[0]}@FILE."
            ) from error
    return file


def _from_timm(name: str, weights: str, changes: dict[str, Any]) -> Converted:
    from timm.models import get_pretrained_cfg, list_pretrained

    architecture, _, tag = name.partition(".")
    known = ", ".join(f"timm:{one}" for one in list_pretrained() if one.partition(".")[0] == architecture) or "none"
    try:
        config = get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError:  # no such tag
        config = None
    if config is None:
        raise ValueError(f"timm:{printable(name, 60)}: no such weights (timm's are {known}).")
    told = config.to_dict()
    given = {"backbone": f"timm:{architecture}", "image_size": list(told["input_size"][1:]), **changes}
    prepared, notes = from_timm(told, EncoderSettings(**given).image_size, name)
    settings = EncoderSettings(**{**prepared, **given})
    if weights or not tag:
        found = _without_download(
            f"timm:{name}@{weights}", settings, weights, f"timm's are {known}",
            str(told.get("classifier") or ""),
        )  # fmt: skip
        return replace(found, notes=notes + found.notes)
    net = timm_models.create(name, pretrained=True)
    state = net.state_dict()
    return Converted(settings, _named(state), notes=notes, num_read=len(state))


def _without_download(source: str, settings: EncoderSettings, weights: str, known: str, classifier: str) -> Converted:
    """Convert a network with weights from a local file, or with random weights.

    Args:
        source: Its name, for messages.
        settings: Its settings.
        weights: The file; empty for random weights.
        known: The library's weights for this network, in words.
        classifier: Prefix of the classifier's tensors in the file.
    """
    if not weights:
        with rng.torch_seeded("backbone"):  # the same weights in every call
            state = make_network(settings).state_dict()
        return Converted(settings, _named(state), notes=[f"random weights, as none are named ({known})."])
    path = Path(expand_path(weights))
    if not path.is_file():
        raise FileNotFoundError(f"{printable(source)}: no such weights, and no such file ({known}).")
    found = _converted(settings, read_torch_file(path), classifier, source)
    seen = describe_preprocessing({key: getattr(settings, key) for key in ("mean", "std", "interpolation")})
    found.notes.append(f"preprocessing: not in the file; that of the library's own weights: {seen}.")
    return found


def _converted(settings: EncoderSettings, content: dict[str, Any], classifier: str, source: str) -> Converted:
    """Convert the weights of a local or downloaded file, without the classifier."""
    net = make_network(settings)
    expected = net.state_dict()
    anchor = next(key for key in expected if sum(other.endswith(key) for other in expected) == 1)  # not in other blocks
    unwrapped = unwrap(content, printable(source), anchors=(anchor,))
    state = {OLD_DENSENET.sub(r"\1\2", key): value for key, value in unwrapped.weights.items()}
    extras = {key: value for key, value in state.items() if classifier and key.startswith(f"{classifier}.")}
    extras = {key: value for key, value in extras.items() if key not in expected}
    missing = {key: value for key, value in expected.items() if key.endswith(COUNTER) and key not in state}
    weights = {key: value for key, value in state.items() if key not in extras} | missing
    return Converted(settings, _named(weights), extras, unwrapped.notes, num_read=len(state))


def _named(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {PREFIX + key: value for key, value in state.items()}
