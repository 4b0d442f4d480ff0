"""Find a network's weights in a released file, among entries, prefixes of names, other networks and other modules.

A file may hold {"student": {...}, "teacher": {...}}, {"state_dict": {"module.backbone.cls_token": ...}} or names such
as "teacher.backbone.cls_token" side by side with those of its head. Networks are found by names that every vision
transformer has (`ANCHORS`): everything in front of such a name is a prefix.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sslvit.files import printable

ANCHORS = ("patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight",
           "embeddings.patch_embeddings.weight", "wte.weight")  # fmt: skip
# in a file with several networks, papers evaluate the moving average of the weights
AVERAGES = ("teacher", "model_ema", "state_dict_ema", "ema", "ema_model", "params_ema", "target_encoder",
            "momentum_encoder")  # fmt: skip
PLAIN = ("student", "model", "state_dict", "encoder", "base_encoder", "backbone", "module", "net", "network", "params")
NO_NETWORK = ("optimizer", "optimizer_states", "lr_schedulers", "scheduler", "scaler", "callbacks", "loops", "amp")
MAX_NESTED = 3  # entries inside entries


@dataclass
class Unwrapped:
    """One network of a file.

    Args:
        weights: Its weights, without a prefix.
        beside: Other tensors that belong to it (a projection head, a decoder), without the common prefix.
        prefix: The prefix that was removed.
        notes: Remarks for the user, one line each.
    """

    weights: dict[str, Tensor]
    beside: dict[str, Tensor] = field(default_factory=dict)
    prefix: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def everything(self) -> dict[str, Tensor]:
        """The weights and the other tensors."""
        return self.beside | self.weights


def unwrap(
    content: dict[str, Any], source: str, network: str | None = None, anchors: tuple[str, ...] = ANCHORS
) -> Unwrapped:
    """Find the network in a file's content.

    Args:
        content: The content as read.
        source: The file, for messages.
        network: An entry or part of a name, such as student or model_ema, for a file with several networks; None for
            the teacher or moving average if there is one.
        anchors: Names that every network of the requested kind has.

    Raises:
        ValueError: There are no weights, none of this network, or several networks without a preferred one.
    """
    dicts = state_dicts(content)
    if not dicts:
        raise ValueError(f"{source}: holds no weights ({_list_entries(content)}).")
    found = [(entry, prefix) for entry, state in dicts.items() for prefix in prefixes_of(state, anchors)]
    labels = {_label(entry, prefix): (entry, prefix) for entry, prefix in found}
    if network is not None:
        labels = {label: key for label, key in labels.items() if network in label.split(".")}
        if not labels:
            raise ValueError(f"{source}: holds no {network} ({_list_entries(content)}).")
    if not labels:  # no vision transformer; the layouts report the missing names
        entry = max(dicts, key=lambda name: len(dicts[name]))
        return Unwrapped(dicts[entry])
    label = _choice(list(labels), source)
    entry, prefix = labels[label]
    state, notes = dicts[entry], []
    others = [other for other in (_label(*key) for key in found) if other != label]
    if others and network is None:
        names = ", ".join(_name(other, [label]) for other in others)
        notes.append(f"several networks: took {_name(label, others)}; also there: {names} (--weights NAME).")
    rivals = [other for name, other in found if name == entry and other != prefix]
    scope = _scope(prefix, rivals)
    inside = tuple(other for other in rivals if not prefix.startswith(other))
    state = {key: value for key, value in state.items() if key.startswith(scope) and not key.startswith(inside)}
    if prefix:
        number = sum(key.startswith(prefix) for key in state)
        notes.append(f"names: prefix {printable(prefix)} removed from {number} of {len(state)}.")
    weights = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    shared = shared_prefix(set(state))
    beside = {key.removeprefix(shared): value for key, value in state.items() if not key.startswith(prefix)}
    beside = {shared + key if key in weights else key: value for key, value in beside.items()}
    return Unwrapped(weights, beside, prefix, notes)


def state_dicts(content: dict[str, Any], entry: str = "", nested: int = 0) -> dict[str, dict[str, Tensor]]:
    """Name of an entry -> its tensors, for every entry that contains tensors; "" for the file itself."""
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    found = {entry: tensors} if tensors else {}
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, dict) and key not in NO_NETWORK and nested < MAX_NESTED:
            found |= state_dicts(value, f"{entry}.{key}" if entry else key, nested + 1)
    return found


def prefixes_of(names: dict[str, Any], anchors: tuple[str, ...] = ANCHORS) -> list[str]:
    """Prefixes of the anchors, one for each network; "" for no prefix."""
    found = {key[: -len(anchor)] for key in names for anchor in anchors if key.endswith(anchor)}
    return sorted(prefix for prefix in found if not prefix or prefix.endswith("."))


def shared_prefix(names: set[str]) -> str:
    """The longest prefix of complete dotted parts that all names share."""
    shared: list[str] = []
    for words in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(words)) > 1:
            break
        shared.append(words[0])
    return "".join(f"{word}." for word in shared)


def _label(entry: str, prefix: str) -> str:
    return ".".join(word for word in (entry, prefix.removesuffix(".")) if word)


def _rank(label: str) -> int:
    """Lower is preferred."""
    order = [*AVERAGES, *PLAIN]
    return min((order.index(word) for word in label.split(".") if word in order), default=len(order))


def _choice(labels: list[str], source: str) -> str:
    ranks = {label: _rank(label) for label in labels}
    best = [label for label in labels if ranks[label] == min(ranks.values())]
    if len(best) == 1:
        return best[0]
    names = sorted({_name(label, [other for other in best if other != label]) for label in best})
    raise ValueError(f"{source}: holds several networks ({printable(', '.join(names))}). Name one: --weights NAME.")


def _name(label: str, others: list[str]) -> str:
    """The first part of a label that distinguishes it from others; the whole label if there is none."""
    elsewhere = {word for other in others for word in other.split(".")}
    return printable(next((word for word in label.split(".") if word not in elsewhere), label or "the file itself"))


def _scope(prefix: str, others: list[str]) -> str:
    """The shortest part of a prefix that no other network shares; all tensors with it belong to this network."""
    words = prefix.split(".")[:-1]
    for number in range(len(words) + 1):
        scope = "".join(f"{word}." for word in words[:number])
        if not any(other.startswith(scope) for other in others):
            return scope
    return prefix


def _list_entries(content: dict[str, Any]) -> str:
    names = Counter(str(key).split(".")[0] for key in content)
    return f"its entries: {printable(', '.join(list(names)[:6]))}"
