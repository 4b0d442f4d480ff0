"""The documentation site (`make docs`): these pages as they are, and a reference that is read off the code."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))

import sslvit  # noqa: E402

project, author, copyright = "sslvit", "the sslvit authors", "the sslvit authors"
version = release = sslvit.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"sslvit {release}"
html_theme_options = {"source_repository": "https://github.com/sslvit/sslvit/", "source_branch": "main",
                      "source_directory": "docs/"}  # fmt: skip
exclude_patterns = ["_build", "examples"]
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_google_docstring, napoleon_numpy_docstring = True, False
nitpicky = False
linkcheck_ignore = [r"https://github\.com/sslvit/.*"]
GENERATED = DOCS / "reference" / "generated"


def write_reference(app: object = None) -> None:
    """Pages on every command, setting and recipe, from the dataclasses that the program itself reads."""
    GENERATED.mkdir(parents=True, exist_ok=True)
    (GENERATED / "commands.md").write_text(commands())
    (GENERATED / "settings.md").write_text(settings())
    (GENERATED / "recipes.md").write_text(recipes())


def commands() -> str:
    """What `--help` says of each command."""
    from sslvit.cli import COMMANDS
    from sslvit.commands.arguments import add_options, options_class

    parts = [
        "# Commands",
        "",
        "What `sslvit COMMAND --help` says. Settings of a recipe are on [their page](settings.md).",
        "",
    ]
    for name, function in COMMANDS.items():
        parser = argparse.ArgumentParser(
            f"sslvit {name}", formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=100)
        )
        add_options(parser, options_class(function))
        parts += [f"## sslvit {name}", "", "```text", parser.format_help().rstrip(), "```", ""]
    return "\n".join(parts)


def settings() -> str:
    """Every setting of a recipe, section by section."""
    from sslvit.settings.describe import in_yaml, select_settings

    parts = [
        "# Settings",
        "",
        "What `sslvit settings` says: keys of a recipe's YAML, which the command line takes as `--KEY VALUE`.",
        "",
    ]
    section = None
    for record, key, default, text in select_settings(None):
        if (record, key.rpartition(".")[0]) != section:
            section = record, key.rpartition(".")[0]
            kind = next((f" ({field.default})" for field in fields(record) if field.name in ("name", "kind")
                         and isinstance(field.default, str)), "")  # fmt: skip
            parts += ["", f"## {section[1] or 'run'}{kind}", "", "| key | default | meaning |", "|---|---|---|"]
        parts.append(f"| `{key}` | `{in_yaml(default)}` | {text.replace('|', chr(92) + '|').replace('<', '&lt;')} |")
    return "\n".join(parts) + "\n"


def recipes() -> str:
    """The recipes with their headers."""
    from sslvit.settings.load import recipe_names, recipes_folder
    from sslvit.settings.recipes import read_header

    parts = ["# Recipes", "", "What `sslvit recipes` lists; `sslvit recipes NAME` prints one.", ""]
    for name in recipe_names():
        title, said = read_header((recipes_folder() / f"{name}.yaml").read_text())
        parts += [f"## {name}", "", title, "", *(f"- {field}: {words}" for field, words in said.items()), ""]
    return "\n".join(parts)


def examples_as_code(app: object, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Examples in docstrings become blocks of code; what is returned is a sentence and no type with a text."""
    for number in reversed(range(len(lines))):
        if number and lines[number - 1].strip() == "Returns:":
            lines[number] = lines[number].replace(": ", " \u2013 ")
        if lines[number].strip() == "Example:":
            lines[number : number + 1] = [lines[number].replace("Example:", "Example::"), ""]


def setup(app: object) -> None:
    """Sphinx's hook: the reference is written before pages are read."""
    app.connect("autodoc-process-docstring", examples_as_code, priority=1)  # type: ignore[attr-defined]
    app.connect("builder-inited", write_reference)  # type: ignore[attr-defined]
