"""What a reader of an export must know: card.json for programs, README.md for people."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sslvit import __version__
from sslvit.evaluate.scores import markdown_text
from sslvit.export.exported import Exported
from sslvit.layouts.preprocessing import crop_words, fraction_held

CARD = ("card.json", "README.md")
NOT_TOLD = ("out", "init", "seed", "online")  # of a run's settings: the author's own paths, and what changes no weight


def make_card(exported: Exported, source: str | Path, kind: str, is_fixed: bool, scores: list[Path]) -> dict[str, Any]:
    """Facts about an export.

    Args:
        exported: what was written.
        source: where the encoder came from.
        kind: of the format.
        is_fixed: images have one size.
        scores: files that `sslvit probe -o` and its relatives wrote.
    """
    settings = exported.settings
    provenance, run = exported.provenance, exported.provenance.get("settings")
    recipe = {key: value for key, value in run.items() if key not in NOT_TOLD} if isinstance(run, dict) else {}
    # transformers' ImageGPT maps pixels in [-1, 1] to colours, whatever units the encoder's images have
    is_palette = kind == "transformers" and settings.tokens == "pixel"
    mean, std = ([0.5] * settings.channels,) * 2 if is_palette else (settings.mean, settings.std)
    # timm and transformers resize to whole pixels before they crop
    fraction = fraction_held(settings) if kind in ("timm", "transformers") else settings.crop_fraction
    return {
        "format": kind, "sslvit": __version__, "outputs": exported.outputs,
        "image_sizes": "fixed" if is_fixed else "any",
        "parameters": sum(parameter.numel() for parameter in exported.parameters()),
        "encoder": asdict(settings), "weights": provenance.get("weights"),
        "classes": exported.classes,
        "preprocessing": {
            "crop": crop_words(settings.crop_mode, fraction), "crop_mode": settings.crop_mode,
            "crop_fraction": fraction, "size": settings.image_size,
            "channels": settings.channels, "interpolation": settings.interpolation, "scale": "0 to 1",
            "mean": mean, "std": std,
        },
        "task": provenance.get("task"), "step": provenance.get("step"), "data": provenance.get("data"),
        "recipe": recipe, "imported_from": provenance.get("imported_from"), "scores": known_scores(source, scores),
    }  # fmt: skip


def known_scores(source: str | Path, files: list[Path]) -> dict[str, Any]:
    """File -> what it says: those given, and a fine-tuned run's own.

    Raises:
        ValueError: a file is no JSON of scores.
    """
    own = Path(source) / "scores.json"
    found: dict[str, Any] = {}
    for file in [*([own] if own.is_file() else []), *files]:
        try:
            content = json.loads(file.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"--scores {file}: not readable as scores ({error}).") from error
        if not isinstance(content, dict):
            raise ValueError(f"--scores {file}: holds a {type(content).__name__}, not scores.")
        if file.name in found:
            raise ValueError(f"--scores {file}: two files of this name. Rename one, so that the card tells them apart.")
        found[file.name] = content
    return found


def in_quotes(path: str | Path) -> str:
    """A path as it stands between the quotes of a program."""
    return json.dumps(str(path), ensure_ascii=not str(path).isprintable())[1:-1]


def write_card(card: dict[str, Any], verdict: dict[str, Any], how: str, folder: Path, name: str) -> None:
    """card.json and README.md."""
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    (folder / "README.md").write_text("\n".join(_lines(card, verdict, how, name)) + "\n")


def _lines(card: dict[str, Any], verdict: dict[str, Any], how: str, name: str) -> list[str]:
    encoder, prepared = card["encoder"], card["preprocessing"]
    height, width = prepared["size"]
    sentence = f"{prepared['crop'][0].upper()}{prepared['crop'][1:].removesuffix(',')}"
    lines = [
        f"# {markdown_text(name)}", "",
        f"A vision transformer of {card['parameters'] / 1e6:.1f} M parameters ({encoder['depth']} blocks, width "
        f"{encoder['width']}, {encoder['heads']} heads, patch {encoder['patch']}), written by sslvit {card['sslvit']} "
        f"for {card['format']}. It gives {card['outputs']}.", "",
        "```python", how, "```", "",
        "## Preprocessing", "",
        f"{sentence}, resized to {height} x {width} ({prepared['interpolation']}); pixels from "
        f"0 to 1, minus mean {_numbers(prepared['mean'])}, over std {_numbers(prepared['std'])}.",
        "It takes images of this size only." if card["image_sizes"] == "fixed"
        else f"It takes other sizes too, in multiples of {encoder['patch']}.", "",
        "## Origin", "",
    ]  # fmt: skip
    told = {key: markdown_text(card[key]) for key in ("weights", "task", "imported_from") if card[key]}
    which = f", the {told['weights']}'s weights" if "weights" in told else ""
    if "task" in told:
        steps = f", {card['step']:,} steps" if isinstance(card["step"], int) else ""
        lines.append(f"Trained by {told['task']}{steps}{which}; the recipe stands in card.json.")
    elif "imported_from" in told:
        lines.append(f"Imported from {told['imported_from']}{which}.")
    else:
        lines.append("Not known.")
    if isinstance(data := card["data"], dict):
        samples, known = (markdown_text(data.get(key)) for key in ("samples", "fingerprint"))
        lines.append(f"Data: {samples} images, fingerprint {known}.")
    lines += ["", "## Scores", ""]
    found = [f"- {markdown_text(file)}: {markdown_text(_brief(content))}" for file, content in card["scores"].items()]
    lines += found or ["None known."]
    lines += [
        "", "## Verdict", "",
        f"Reopened in {card['format']} and compared on fixed images: largest difference "
        f"{verdict['largest_difference']:.1e}, allowed {verdict['tolerance']:.0e} (verdict.json).",
    ]  # fmt: skip
    if card["classes"]:
        lines += ["", "## Classes", "", ", ".join(markdown_text(name) for name in card["classes"])]
    return lines


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _brief(content: dict[str, Any]) -> str:
    """The scores of one file in a line."""
    top1, images = content.get("top1"), content.get("images")
    if isinstance(top1, float) and isinstance(images, int):
        return f"{top1:.1f} % right of {images:,} images"
    return json.dumps(content.get("rows", content))[:400]
