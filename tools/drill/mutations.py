"""Valid bytes -> damaged bytes: what disks, transfers, editors and attackers do to files."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from functools import cache
from typing import Any

import yaml

NUMBERS = (0, -1, 1, 2, 255, 256, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63), 10_000_000)
FLOATS = (float("nan"), float("inf"), -float("inf"), 1e308, 5e-324, -0.0, 0.5)
TEXTS = (
    "", " ", "null", "nan", "0", "-1", "../../outside", "/etc/hostname", "a/b", ".", "..", "\x00", "\x1b[31mred\x1b[0m",
    "line\nbreak", "\u202e txt.exe", "\ud800", "{}", "{0..99}", "%s%n", "$HOME", "~", "pipe:touch outside", "x" * 5000,
    "file:///etc/hostname", "http://[", "é" * 40, "=1+1", "<b>",
)  # fmt: skip


def damage_bytes(content: bytes, rng: random.Random) -> bytes:
    """A few of: flipped bits, other bytes, a cut, a hole, a piece taken out, put in twice or elsewhere, odd numbers."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        if not data:
            return b""
        rng.choice(_BYTE_CHANGES)(data, rng)
    return bytes(data)


def _place(data: bytearray, rng: random.Random) -> int:
    """Anywhere, and half of the time where headers are."""
    return rng.randrange(min(len(data), rng.choice((64, 512, len(data), len(data)))))


def _flip(data: bytearray, rng: random.Random) -> None:
    data[_place(data, rng)] ^= 1 << rng.randrange(8)


def _byte(data: bytearray, rng: random.Random) -> None:
    data[_place(data, rng)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def _number(data: bytearray, rng: random.Random) -> None:
    """A number of two, four or eight bytes, larger or smaller than anybody wanted."""
    size = rng.choice((2, 4, 8))
    value = rng.choice(
        (0, 1, 2 ** (8 * size) - 1, 2 ** (8 * size - 1), 2 ** (8 * size - 1) - 1, rng.getrandbits(8 * size))
    )
    place = _place(data, rng)
    data[place : place + size] = value.to_bytes(size, rng.choice(("little", "big")))


def _cut(data: bytearray, rng: random.Random) -> None:
    del data[_place(data, rng) :]


def _hole(data: bytearray, rng: random.Random) -> None:
    place, size = _place(data, rng), rng.choice((1, 4, 16, 512))
    data[place : place + size] = bytes(min(size, len(data) - place))


def _take_out(data: bytearray, rng: random.Random) -> None:
    place = _place(data, rng)
    del data[place : place + rng.choice((1, 2, 8, 64, 512))]


def _repeat(data: bytearray, rng: random.Random) -> None:
    place = _place(data, rng)
    piece = data[place : place + rng.choice((1, 4, 32, 512))]
    data[place:place] = piece * rng.choice((1, 2, 50))


def _move(data: bytearray, rng: random.Random) -> None:
    place, size = _place(data, rng), rng.choice((4, 32, 512))
    piece = data[place : place + size]
    del data[place : place + size]
    other = rng.randrange(len(data) + 1)
    data[other:other] = piece


def _insert(data: bytearray, rng: random.Random) -> None:
    place = _place(data, rng)
    data[place:place] = rng.choice(
        (b"\0", b"\xff\xfe", b"\n", b'"', b"'", b",", b"\xf0\x9f", b"<!--", rng.randbytes(5))
    )


_BYTE_CHANGES: tuple[Callable, ...] = (
    _flip,
    _flip,
    _byte,
    _number,
    _number,
    _cut,
    _hole,
    _take_out,
    _repeat,
    _move,
    _insert,
)


def damage_values(tree: Any, rng: random.Random) -> Any:
    """Nested values with a few of them replaced, left out, doubled, renamed or nested too deep."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(tree))
        if not places:
            return odd_value(rng)
        # the rare first: one name in the settings counts like a list of a thousand numbers
        depth = rng.randrange(1 + max(len(path) for path in places))
        path = rng.choice([path for path in places if len(path) >= depth] or places)
        *above, last = path
        parent = tree
        for key in above:
            parent = parent[key]
        what = rng.random()
        if what < 0.6:
            parent[last] = odd_value(rng, parent[last])
        elif what < 0.8:
            del parent[last]
        elif isinstance(parent, dict):
            parent[rng.choice(TEXTS)] = parent[last] if what < 0.9 else odd_value(rng)
        else:
            parent[last:last] = [parent[last]] * rng.choice((1, 2, 1000))
    return tree


def _places(tree: Any, path: tuple = ()):
    """Every place in nested lists and dicts; of long lists a few."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for number, (key, value) in enumerate(items):
        if number > 50:
            return
        yield (*path, key)
        yield from _places(value, (*path, key))


def odd_value(rng: random.Random, before: Any = None) -> Any:
    """A value that nobody expects, of the same type as before or of another."""
    kind = rng.randrange(9)
    if kind == 0:
        return rng.choice((None, True, False))
    if kind <= 2 or (kind == 8 and isinstance(before, int)):
        return rng.choice(NUMBERS)
    if kind == 3:
        return rng.choice(FLOATS)
    if kind <= 5 or (kind == 8 and isinstance(before, str)):
        return rng.choice(TEXTS)
    if kind == 6:
        return rng.choice(([], {}, [[]], [None] * 3, {"": {}}, [0] * 2000, {"a": {"b": {"c": 1}}}))
    if kind == 7:
        deep: Any = rng.choice(("x", 1, None))
        for _ in range(rng.choice((3, 40, 120))):
            deep = [deep] if rng.random() < 0.5 else {"a": deep}
        return deep
    return [before, before] if before is not None else "?"


def damage_json(content: bytes, rng: random.Random) -> bytes:
    """JSON with other values, or with other bytes."""
    what = rng.random()
    if what < 0.25:
        return damage_bytes(content, rng)
    if what < 0.28:  # deeper than any parser goes
        return b"[" * 100_000 if rng.random() < 0.5 else b'{"a":' * 20_000
    if what < 0.30:
        return b'{"n": ' + b"9" * 5000 + b"}"
    text = json.dumps(damage_values(json.loads(content), rng))
    return text.encode()


def damage_yaml(content: bytes, rng: random.Random) -> bytes:
    """YAML with other values, other bytes, or what only YAML has."""
    what = rng.random()
    if what < 0.3:
        return damage_bytes(content, rng)
    if what < 0.36:
        tag = rng.choice(
            (
                b"!!python/object/apply:os.mkdir [outside]",
                b"!!binary x",
                b"!!timestamp x",
                b"&a [*a]",
                b"2001-99-99",
                b"0x",
                b"1_0:70",
                b"? [a, b]\n: c",
                b"<<: 3",
                b"!unknown x",
                b"&a [*a, *b]",
                b"- - - [",
                b"%YAML 9.9",
            )
        )
        return content + b"\nmore: " + tag + b"\n" if rng.random() < 0.7 else tag
    if what < 0.38:  # each name ten times the one before
        lines = [b"a0: &a0 [x,x,x,x,x,x,x,x,x]"] + [
            b"a%d: &a%d [%s]" % (i, i, b",".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 9)
        ]
        return b"\n".join(lines) + b"\n" + content
    if what < 0.40:
        return b"[" * 5_000
    tree = damage_values(_parsed_yaml(content), rng)
    try:
        return yaml.dump(tree, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper)).encode()
    except UnicodeEncodeError:  # half a character
        return json.dumps(tree).encode()


@cache
def _parsed_yaml(content: bytes) -> Any:
    return yaml.load(content, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
