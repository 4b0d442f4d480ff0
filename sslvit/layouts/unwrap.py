"""What released files put around a network's weights: entries, prefixes of names, a second network, other parts.

A file may hold {"student": {...}, "teacher": {...}}, {"state_dict": {"module.backbone.cls_token": ...}} or names such
as "teacher.backbone.cls_token" side by side with those of its head. All of this is found by the names that every
vision transformer has (`ANCHORS`): what stands in front of such a name is a prefix.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sslvit.files import printable

ANCHORS = ("patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight", "wte.weight")
# in a file with several networks: the average over training is the result that papers report and evaluate
AVERAGES = ("teacher", "model_ema", "state_dict_ema", "ema", "ema_model", "params_ema", "target_encoder",
            "momentum_encoder")  # fmt: skip
PLAIN = ("student", "model", "state_dict", "encoder", "base_encoder", "backbone", "module", "net", "network", "params")
NO_NETWORK = ("optimizer", "optimizer_states", "lr_schedulers", "scheduler", "scaler", "callbacks", "loops", "amp")
MAX_NESTED = 3  # entries inside entries


@dataclass
class Unwrapped:
    """One network of a file.

    Args:
        weights: under the names of its layout, without a prefix.
        beside: other tensors that belong to it (a projection head, a decoder), without the prefix that all share.
        prefix: what was taken off.
        notes: what a reader should know, one line each.
    """

    weights: dict[str, Tensor]
    beside: dict[str, Tensor] = field(default_factory=dict)
    prefix: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def everything(self) -> dict[str, Tensor]:
        return self.beside | self.weights


def unwrap(content: dict[str, Any], source: str, network: str | None = None) -> Unwrapped:
    """The network in a file's content.

    Args:
        content: as read.
        source: for messages.
        network: an entry or part of a name, such as student or model_ema, of a file with several networks; None for the
            teacher, an average over training, or what there is.

    Raises:
        ValueError: there are no weights, none of this network, or several networks and no way to choose.
    """
    dicts = state_dicts(content)
    if not dicts:
        raise ValueError(f"{source}: holds no weights ({_shown_entries(content)}).")
    found = [(entry, prefix) for entry, state in dicts.items() for prefix in prefixes_of(state)]
    labels = {_label(entry, prefix): (entry, prefix) for entry, prefix in found}
    if network is not None:
        labels = {label: place for label, place in labels.items() if network in label.split(".")}
        if not labels:
            raise ValueError(f"{source}: holds no {network} ({_shown_entries(content)}).")
    if not labels:  # no vision transformer; the layouts say what is missing
        entry = max(dicts, key=lambda name: len(dicts[name]))
        return Unwrapped(dicts[entry])
    label = _choice(list(labels), source)
    entry, prefix = labels[label]
    state, notes = dicts[entry], []
    others = [other for other in (_label(*place) for place in found) if other != label]
    if others and network is None:
        there = ", ".join(_name(other, [label]) for other in others)
        notes.append(f"several networks: took {_name(label, others)}; also there: {there} (weights=, --weights NAME).")
    rivals = [other for where, other in found if where == entry and other != prefix]
    scope = _scope(prefix, rivals)
    inside = tuple(other for other in rivals if not prefix.startswith(other))
    state = {key: value for key, value in state.items() if key.startswith(scope) and not key.startswith(inside)}
    if prefix:
        number = sum(key.startswith(prefix) for key in state)
        notes.append(f"names: prefix {printable(prefix)} taken off {number} of {len(state)}.")
    weights = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    shared = shared_prefix(set(state))
    beside = {key.removeprefix(shared): value for key, value in state.items() if not key.startswith(prefix)}
    beside = {shared + key if key in weights else key: value for key, value in beside.items()}
    return Unwrapped(weights, beside, prefix, notes)


def state_dicts(content: dict[str, Any], entry: str = "", nested: int = 0) -> dict[str, dict[str, Tensor]]:
    """Name of an entry -> the tensors in it, for every entry that holds tensors; "" for the file itself."""
    own = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    found = {entry: own} if own else {}
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, dict) and key not in NO_NETWORK and nested < MAX_NESTED:
            found |= state_dicts(value, f"{entry}.{key}" if entry else key, nested + 1)
    return found


def prefixes_of(names: dict[str, Any]) -> list[str]:
    """What stands in front of the names that every vision transformer has; "" for nothing."""
    found = {key[: -len(anchor)] for key in names for anchor in ANCHORS if key.endswith(anchor)}
    return sorted(prefix for prefix in found if not prefix or prefix.endswith("."))


def shared_prefix(names: set[str]) -> str:
    """The parts, each with its dot, that all names begin with; each keeps a part of its own."""
    shared: list[str] = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return "".join(f"{part}." for part in shared)


def _label(entry: str, prefix: str) -> str:
    return ".".join(part for part in (entry, prefix.removesuffix(".")) if part)


def _rank(label: str) -> int:
    """The lower, the rather it is taken."""
    order = [*AVERAGES, *PLAIN]
    parts = label.split(".")
    averages = [AVERAGES.index(part) for part in parts if part in AVERAGES]
    return min(averages or [order.index(part) for part in parts if part in order] or [len(order)])


def _choice(labels: list[str], source: str) -> str:
    ranks = {label: _rank(label) for label in labels}
    best = [label for label in labels if ranks[label] == min(ranks.values())]
    if len(best) == 1:
        return best[0]
    names = sorted({_name(label, [other for other in best if other != label]) for label in best})
    raise ValueError(
        f"{source}: holds several networks ({printable(', '.join(names))}). Name one: weights= (--weights NAME)."
    )


def _name(label: str, others: list[str]) -> str:
    """The first part of a label that tells it from others; the label itself where none does."""
    elsewhere = {part for other in others for part in other.split(".")}
    return printable(next((part for part in label.split(".") if part not in elsewhere), label or "the file itself"))


def _scope(prefix: str, others: list[str]) -> str:
    """The part of a prefix within which there is this network alone, so that what is beside it there is its own."""
    parts = prefix.split(".")[:-1]
    for number in range(len(parts) + 1):
        scope = "".join(f"{part}." for part in parts[:number])
        if not any(other.startswith(scope) for other in others):
            return scope
    return prefix


def _shown_entries(content: dict[str, Any]) -> str:
    names = Counter(str(key).split(".")[0] for key in content)
    return f"its entries: {printable(', '.join(list(names)[:6]))}"
