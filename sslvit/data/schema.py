"""Validate the JSON files that describe shards: index.json, the reports of a packing and its job.json.

These files come from other machines and other people, so every field is checked when the file is read, and later code
can rely on it. All functions here raise ValueError with the problem; the caller adds the file and the remedy.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable, Collection
from itertools import pairwise
from typing import Any, Literal, get_origin, get_type_hints

from sslvit.files import printable

FORMAT = 3
MAX_CHANNELS = 4096
MAX_COUNT = 2**62  # of samples and bytes, so that sums fit 64 bits
MAX_SIDE = 2**31 - 1
MAX_SETTING = 100  # characters
SHA256 = re.compile("[0-9a-f]{64}", re.ASCII)
PLAIN_NAME = re.compile("[A-Za-z0-9_-][A-Za-z0-9_.-]*", re.ASCII)  # the usual form of a shard name
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def parse_json(content: bytes) -> Any:
    """Parse a JSON file."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({printable(error, 80)})") from error


def check_shard_name(name: object) -> str:
    """Return the name of a shard; raises ValueError if it leads out of the folder of the index."""
    if isinstance(name, str) and PLAIN_NAME.fullmatch(name):
        return name
    name = _text("the name of a shard", name)
    if name.startswith("/") or "://" in name or ".." in name.split("/"):
        raise ValueError(f"the shard {_brief(name)} lies outside of its folder")
    if CONTROL.search(name) or name.rpartition("/")[2] in ("", "."):
        raise ValueError(f"the shard {_brief(name)} has no usable name (rename it)")
    return name


def checked_index(content: Any, is_cached: bool = False) -> dict[str, Any]:
    """Return the content of an index.json after checking that every field is as ShardIndex expects it.

    Args:
        content: Parsed content.
        is_cached: Whether the index was made on this machine, so that its names may be paths and addresses.
    """
    version = _get(content, "format", "the index")
    if type(version) is not int or version != FORMAT:
        raise ValueError(f"format {_brief(version)}, this sslvit reads {FORMAT}")
    _sha256("records_sha256", _get(content, "records_sha256", "the index"))
    for name, check in INDEX_FIELDS.items():
        check(name, _get(content, name, "the index"))
    _text("job", content.setdefault("job", ""))  # only packing writes it
    for name in ("mean", "std"):
        _numbers(name, content[name], content["channels"])
    splits = _get(content, "splits", "the index")
    if not isinstance(splits, dict) or len(splits) != 1:
        raise ValueError(f"splits is {_brief(splits)}, expected one split")
    (split,) = splits.values()
    columns = {
        "filenames": _text if is_cached else lambda _, name: check_shard_name(name),
        "shard_lengths": _count, "bytes": _count, "sha256": _sha256,
    }  # fmt: skip
    shards = None
    for column, check in columns.items():
        values = _list(column, _get(split, column, "its split"))
        shards = len(values) if shards is None else shards
        if len(values) != shards:
            raise ValueError(f"{column} has {len(values)} entries for {shards} shards")
        for value in values:
            check(column, value)
    samples = _count("num_samples", _get(split, "num_samples", "its split"))
    if samples != sum(split["shard_lengths"]):
        raise ValueError(f"num_samples is {samples}, but its shards hold {sum(split['shard_lengths'])}")
    return content


def checked_report(content: Any, name: str) -> dict[str, Any]:
    """Return a report on the shard of this name after checking it for ShardReport.from_dict."""
    _keys("the report", content, ("shard", "measured", "skipped"))
    _names("skipped", content["skipped"])
    shard, measured = content["shard"], content["measured"]
    _keys("shard", shard, ("name", "samples", "bytes", "sha256"))
    if shard["name"] != name:
        raise ValueError(f"it is a report on {_brief(shard['name'])}, not on {name}")
    _count("samples", shard["samples"])
    _count("bytes", shard["bytes"])
    _sha256("sha256", shard["sha256"])
    _keys("measured", measured, ("moments", "channels", "images", "sizes", "modes", "kinds", "parts"))
    images, channels = _count("images", measured["images"]), _integer("channels", measured["channels"], 0, MAX_CHANNELS)
    moments = _list("moments", measured["moments"])
    if len(moments) != (2 if images else 0) or (images and not channels):
        raise ValueError(f"moments are {_brief(moments)} for {images} images of {channels} channels")
    for sums in moments:
        _numbers("moments", sums, channels)
    for row in _list("sizes", measured["sizes"]):
        _row("sizes", row, (MAX_SIDE, MAX_SIDE, MAX_COUNT))
    for row in _list("kinds", measured["kinds"]):
        _row("kinds", row, (MAX_CHANNELS, 16, MAX_COUNT))
        _bits("kinds", row[1])
    for name in ("modes", "parts"):
        if not isinstance(measured[name], dict):
            raise ValueError(f"{name} is {_brief(measured[name])}, expected counts by name")
        for text, count in measured[name].items():
            _text(name, text)
            _count(name, count)
    return content


def checked_job(content: Any, settings: type) -> dict[str, Any]:
    """Return the content of a job.json, which includes the fields of its settings, after checking it."""
    images = _count("images", _get(content, "images", "the job"))
    for name in ("source", "times"):
        _text(name, _get(content, name, "the job"))
    _classes("classes", _get(content, "classes", "the job"))
    _names("passed_over", _get(content, "passed_over", "the job"))
    for name, hint in get_type_hints(settings).items():
        value = _get(content, name, "the job")
        hint = str if get_origin(hint) is Literal else hint
        kinds = (hint, int) if hint is float else hint
        if not isinstance(value, kinds) or (isinstance(value, bool) and hint is not bool):
            raise ValueError(f"{name} is {_brief(value)}, expected {getattr(hint, '__name__', hint)}")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            _number(name, value)
        if isinstance(value, str) and (len(value) > MAX_SETTING or not value.isprintable()):
            raise ValueError(f"{name} is {_brief(value)}, which is not a setting")
    starts = _list("starts", _get(content, "starts", "the job"))
    for start in starts:
        _integer("starts", start, 0, images)
    if starts[:1] != [0] or starts[-1] != images or any(a >= b for a, b in pairwise(starts)):
        raise ValueError(f"starts is {_brief(starts)}, expected increasing numbers from 0 to {images}")
    return content


def _brief(value: object) -> str:
    """The beginning of a value, which may be megabytes long."""
    return printable(reprlib.repr(value), 60)


def _get(content: object, key: str, where: str) -> Any:
    if not isinstance(content, dict):
        raise ValueError(f"{where} is {_brief(content)}, expected an object")
    if key not in content:
        raise ValueError(f"{where} has no {key}")
    return content[key]


def _keys(where: str, content: Any, keys: Collection[str]) -> None:
    for key in keys:
        _get(content, key, where)
    unknown = content.keys() - set(keys)
    if unknown:
        raise ValueError(f"{where} has an unknown {_brief(min(unknown))}")


def _list(key: str, value: object) -> list:
    if not isinstance(value, list):
        raise ValueError(f"{key} is {_brief(value)}, expected a list")
    return value


def _text(key: str, value: object) -> str:
    try:
        if isinstance(value, str) and value.encode("utf-8", "surrogateescape") is not None:
            return value
    except UnicodeEncodeError:  # a lone surrogate that no file name can contain
        pass
    raise ValueError(f"{key} is {_brief(value)}, expected a string")


def _integer(key: str, value: object, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{key} is {_brief(value)}, expected int in [{low}, {high}]")
    return value


def _count(key: str, value: object) -> int:
    return _integer(key, value, 0, MAX_COUNT)


def _number(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1e18 < value < 1e18:
        raise ValueError(f"{key} is {_brief(value)}, expected a number below 1e18 in magnitude")
    return value


def _numbers(key: str, value: object, length: int) -> None:
    numbers = _list(key, value)
    if len(numbers) != length:
        raise ValueError(f"{key} has {len(numbers)} numbers for {length} channels")
    for number in numbers:
        if _number(key, number) < 0:
            raise ValueError(f"{key} is {_brief(number)}, expected a number of 0 or more")


def _row(key: str, value: object, limits: tuple[int, ...]) -> None:
    row = _list(key, value)
    if len(row) != len(limits):
        raise ValueError(f"{key} has the row {_brief(value)}, expected {len(limits)} numbers")
    for number, limit in zip(row, limits, strict=True):
        _integer(key, number, 1, limit)


def _bits(key: str, value: object) -> None:
    if type(value) is not int or value not in (8, 16):
        raise ValueError(f"{key} is {_brief(value)}, expected 8 or 16")


def _sha256(key: str, value: object) -> None:
    if not isinstance(value, str) or not SHA256.fullmatch(value):
        raise ValueError(f"{key} is {_brief(value)}, expected 64 hexadecimal digits")


def _classes(key: str, value: object) -> None:
    for name in [] if value is None else _list(key, value):
        _text(key, name)


def _image_size(key: str, value: object) -> None:
    if value is not None:
        _row(key, value, (MAX_SIDE, MAX_SIDE))


def _orientation(key: str, value: object) -> None:
    if value not in ("upright", "stored"):
        raise ValueError(f"{key} is {_brief(value)}, expected upright or stored")


def _names(key: str, value: object) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{key} is {_brief(value)}, expected an object of strings")
    for name, reason in value.items():
        _text(key, name)
        _text(key, reason)


INDEX_FIELDS: dict[str, Callable[[str, object], Any]] = {
    "classes": _classes,
    "channels": lambda key, value: _integer(key, value, 1, MAX_CHANNELS),
    "bits": _bits,
    "mean": _list,  # its length is checked in checked_index
    "std": _list,
    "image_size": _image_size,
    "encoding": _text,
    "orientation": _orientation,
    "skipped": _names,
}
