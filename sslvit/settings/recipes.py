"""The recipes that come with sslvit, with data, encoder, cost and score from their headers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sslvit.files import printable
from sslvit.results import Result
from sslvit.settings.choices import near
from sslvit.settings.load import merge_recipe, recipe_names, recipes_folder

FIELDS = ("Data", "Encoder", "Hardware", "Hours", "Score")  # fields of a header, on lines such as "# Data: ..."
NOT_MEASURED = "not measured"
SOURCES = {"(published": " (published)", "(measured here": " (measured)"}
INDENT = 4  # of the second line of a recipe


@dataclass(frozen=True)
class RecipeSummary:
    """The content of a recipe's header.

    Args:
        name: Name of the recipe, for --config.
        title: Summary of the recipe in one sentence.
        task: Name of the training task.
        data: Intended data set.
        encoder: Architecture and number of parameters.
        hardware: Intended hardware.
        hours: Duration, and who measured it.
        score: Expected score, and who measured it.
    """

    name: str
    title: str
    task: str
    data: str
    encoder: str
    hardware: str
    hours: str
    score: str

    @property
    def cost(self) -> str:
        """Hours and hardware in a few words."""
        hours = in_brief(self.hours)
        if hours == NOT_MEASURED:
            return hours
        number, on, hardware = hours.partition(" on ")
        return f"{number} h on {hardware if on else in_brief(self.hardware)}{source_of(self.hours)}"

    def __str__(self) -> str:
        rest = f"{in_brief(self.data)}; score: {in_brief(self.score)}{source_of(self.score)}"
        return f"{self.name:<28}{self.task:<12}{in_brief(self.encoder):<18}{self.cost}\n{' ' * INDENT}{rest}"


@dataclass(repr=False)
class Recipes(Result):
    """The recipes and benches that come with sslvit.

    Args:
        recipes: Summary of each recipe.
        benches: Name of each bench -> title.
    """

    recipes: list[RecipeSummary]
    benches: dict[str, str]

    def text(self) -> str:
        """Two lines for each recipe, one for each bench."""
        head = f"{'recipe':<28}{'task':<12}{'encoder':<18}cost\n{' ' * INDENT}data; score"
        benches = [f"{name:<28}{title}" for name, title in self.benches.items()]
        return "\n".join([head, "", *map(str, self.recipes), "", "benches, for sslvit bench", *benches])

    def to_dict(self) -> dict[str, Any]:
        """The recipes as records, and the benches."""
        return asdict(self)

    def cells(self) -> tuple[Sequence[object], Iterable[Sequence[object]]]:
        """A row for each recipe."""
        rows = ((one.name, one.task, one.encoder, one.data, one.cost, one.score) for one in self.recipes)
        return ("recipe", "task", "encoder", "data", "cost", "score"), rows


def recipes() -> Recipes:
    """List the recipes that come with sslvit.

    Returns:
        The names of the recipes, for `pretrain` and `load_recipe`, with data, encoder, cost and score.

    Example:
        print(sslvit.recipes())
        print(sslvit.load_recipe("mae/digits").train.epochs)
    """
    benches = {name: read_header(recipe_text(name))[0] for name in recipe_names("bench")}
    return Recipes([summarize(name) for name in recipe_names()], benches)


def summarize(name: str) -> RecipeSummary:
    """Summarize a recipe from its header.

    Raises:
        FileNotFoundError: No recipe of that name comes with sslvit.
    """
    title, fields = read_header(recipe_text(name))
    task = merge_recipe(name)["task"]["name"]
    return RecipeSummary(name, title, task, **{field.lower(): fields[field] for field in FIELDS})


def recipe_text(name: str) -> str:
    """The YAML text of a recipe or bench that comes with sslvit.

    Raises:
        FileNotFoundError: The name is unknown; the message suggests the nearest.
    """
    known = [*recipe_names(), *recipe_names("bench")]
    if name not in known:
        raise FileNotFoundError(
            f"{printable(name)}: no recipe of that name comes with sslvit.{near(name, known)} All: sslvit recipes"
        )
    return (recipes_folder() / f"{name}.yaml").read_text(encoding="utf-8")


def read_header(text: str) -> tuple[str, dict[str, str]]:
    """The first line of a recipe, and the fields of its header, named as in FIELDS."""
    title, fields, last = "", dict[str, str](), ""
    for number, line in enumerate(text.splitlines()):
        if not line.startswith("#"):
            break
        words = line.removeprefix("#").strip()
        found = re.fullmatch(r"([A-Z][a-z]+): (.*)", words)
        if number == 0:
            title = words
        elif found and found[1] in FIELDS:
            last = found[1]
            fields[last] = found[2]
        elif last and line.startswith("#   "):
            fields[last] += f" {words}"
        else:
            last = ""
    return title, {field: words.removesuffix(".") for field, words in fields.items()}


def in_brief(text: str) -> str:
    """The beginning of a field, without its source and remarks: "76.0" of "76.0 (published, He et al.); more"."""
    if text.startswith(NOT_MEASURED):
        return NOT_MEASURED
    return re.split(r" \(|; |, or ", text)[0].removesuffix(" parameters")


def source_of(text: str) -> str:
    """Who measured a value, as one word in parentheses; empty if it was not measured."""
    if text.startswith(NOT_MEASURED):
        return ""
    return next((word for sign, word in SOURCES.items() if sign in text), "")
