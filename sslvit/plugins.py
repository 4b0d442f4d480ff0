"""Plugins: modules that the user names, and entry points of installed packages.

A file never decides what is imported. A module is imported only if the user named it (`--plugin`,
`sslvit.use_plugin`) or installed a package that registers it as an entry point. Names in a recipe, a run's
config.yaml or an encoder.json are looked up among these.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from sslvit.files import brief, expand_path, printable
from sslvit.messages import for_python

# setting or option -> group of entry points that add values to it
GROUPS = {
    "task.name": "sslvit.tasks", "data.view.kind": "sslvit.views", "encoder.tokens": "sslvit.tokenizers",
    "--format": "sslvit.exporters",
}  # fmt: skip


class PluginNeeded(ValueError):
    """A setting names code outside sslvit that the user has not allowed."""


_named: set[str] = set()  # modules that may be imported, including their submodules


@for_python
def use_plugin(module: str) -> None:
    """Import a module and allow settings to refer to its contents by import path, PACKAGE.MODULE:NAME.

    Args:
        module: An importable module or package, or a .py file; separate several by commas.

    Raises:
        ValueError: The module does not exist, or its code fails.

    Example:
        sslvit.use_plugin("docs/examples/simmim.py")
        sslvit.pretrain("mae/digits", data="photos", **{"task.name": "simmim:SimMIM", "encoder.mask_token": True})
    """
    for one in filter(None, map(str.strip, module.split(","))):
        file = Path(expand_path(one)).resolve() if one.endswith(".py") else None
        try:
            name = one if file is None else _put_on_path(file)
            found = import_module(name)
        except Exception as error:  # the module's code may raise anything
            hint = " Is its folder on PYTHONPATH?" if isinstance(error, ModuleNotFoundError) else ""
            reason = f"{type(error).__name__}: {printable(' '.join(str(error).split()), 200)}"
            raise ValueError(f"--plugin {printable(one)}: cannot be imported ({reason}).{hint}") from error
        if file is not None and Path(str(found.__file__)).resolve() != file:
            raise ValueError(f"--plugin {printable(one)}: there is another module called {name}. Rename the file.")
        _named.add(name)


def named_modules() -> list[str]:
    """The modules that the user named, to pass on to child processes."""
    return sorted(_named)


def _put_on_path(file: Path) -> str:
    """Make a .py file importable, and return its module name."""
    if not file.is_file():
        raise FileNotFoundError("no such file")
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))  # last, so that files next to it hide no other module
    return file.stem


def find_plugin(key: str, name: str) -> Any | None:
    """Look up a setting's value among plugins; None if no installed package registers the name.

    Args:
        key: A key of GROUPS.
        name: An import path (PACKAGE.MODULE:NAME), or the name of an entry point.

    Raises:
        PluginNeeded: The user has not allowed that module.
        ValueError: The object cannot be imported.
    """
    if ":" in name:
        return _find_in_module(key, name)
    from importlib.metadata import entry_points  # slow to import, and not needed for --help

    for entry in entry_points(group=GROUPS[key], name=name):
        try:
            return entry.load()
        except Exception as error:
            raise ValueError(
                f"{key}: {brief(name)} is {printable(entry.value)} of an installed package and cannot be imported "
                f"({type(error).__name__}: {printable(str(error), 200)}). Repair or uninstall that package."
            ) from error
    return None


def _find_in_module(key: str, path: str) -> Any:
    module, _, attribute = path.partition(":")
    names = module.split(".")
    if not any(".".join(names[:length]) in _named for length in range(1, len(names) + 1)):
        raise PluginNeeded(
            f"{key}: {brief(path)} is code outside sslvit. If you trust that module, add --plugin {brief(module)}."
        )
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{key}: {brief(path)} cannot be imported ({error}). Write PACKAGE.MODULE:NAME.") from error
