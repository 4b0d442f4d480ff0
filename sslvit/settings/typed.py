"""Parse the values of settings given on the command line."""

from __future__ import annotations

from typing import Any

import yaml

from sslvit.settings.load import YAML_ERRORS, Loader


class _PlainLoader(Loader):
    """YAML loader for null, true, false, numbers, text, lists and dicts; dates stay text, as in folder names."""


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
    """Parse text as YAML, restricted to types that a setting can have.

    Raises:
        One of YAML_ERRORS: The text is not valid YAML.
    """
    return yaml.load(text, _PlainLoader)


def read_value(text: str) -> Any:
    """Parse text as YAML; returns the text itself if it is not valid YAML."""
    try:
        return read_plain(text)
    except YAML_ERRORS:
        return text
