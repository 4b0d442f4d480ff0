"""What is typed behind a setting -> its value."""

from __future__ import annotations

from typing import Any

import yaml

from sslvit.settings.load import YAML_ERRORS


class _PlainLoader(yaml.SafeLoader):
    """Reads null, true, false, numbers, text, lists, and keys with values; a date is text, as in a folder's name."""


_PlainLoader.yaml_implicit_resolvers = {
    sign: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for sign, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_PlainLoader.yaml_constructors = {
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if str(tag).rpartition(":")[2] not in ("timestamp", "set", "binary", "omap", "pairs")
}


def read_plain(text: str) -> Any:
    """What is typed, as YAML reads it, in types that a setting can have.

    Raises:
        One of YAML_ERRORS: It is not YAML.
    """
    return yaml.load(text, _PlainLoader)


def read_value(text: str) -> Any:
    """A value as YAML reads it; text where that cannot."""
    try:
        return read_plain(text)
    except YAML_ERRORS:
        return text
