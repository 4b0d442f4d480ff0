"""The card of an export: card.json for programs, README.md for people."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from sslvit import __version__
from sslvit.checkpoint import fingerprint
from sslvit.evaluate.scores import markdown_table, markdown_text, read_decimals, read_scores, scored_data
from sslvit.exporters.cropping import whole_pixel_fraction
from sslvit.exporters.exported import Exported
from sslvit.files import in_millions, printable
from sslvit.layouts.hub import NAME as HUB_NAME
from sslvit.models import ViTEncoder
from sslvit.settings import TASK_SETTINGS
from sslvit.settings.encoder import crop_words

CARD = ("card.json", "README.md")
LIBRARIES = {"timm": "timm", "transformers": "transformers", "onnx": "onnx", "torch": "pytorch"}  # the Hub's names
OMITTED = ("out", "init", "seed", "online")  # settings of a run that are private paths or not part of the recipe


def make_card(
    exported: Exported, source: str | Path, kind: str, is_fixed: bool, scores: list[Path], license: str
) -> dict[str, Any]:
    """Facts about an export; `scores` are files written by `sslvit probe -o` and similar commands."""
    settings = exported.settings
    provenance, run = exported.provenance, exported.provenance.get("settings")
    init = HUB_NAME.fullmatch(str(run.get("init"))) if isinstance(run, dict) else None
    recipe = {key: value for key, value in run.items() if key not in OMITTED} if isinstance(run, dict) else {}
    # transformers' ImageGPT quantizes pixels in [-1, 1], independent of the encoder's mean and std
    is_palette = kind == "transformers" and settings.tokens == "pixel"
    mean, std = ([0.5] * settings.channels,) * 2 if is_palette else (settings.mean, settings.std)
    # timm and transformers resize to whole pixels before they crop
    fraction = whole_pixel_fraction(settings) if kind in ("timm", "transformers") else settings.crop_fraction
    return {
        "format": kind, "sslvit": __version__, "license": license, "outputs": exported.outputs,
        "image_sizes": "fixed" if is_fixed else "any",
        "parameters": sum(parameter.numel() for parameter in exported.parameters()),
        "encoder": asdict(settings), "weights": provenance.get("weights"),
        "classes": exported.classes,
        "preprocessing": {
            "crop": crop_words(settings.crop_mode, fraction, list(settings.size)), "crop_mode": settings.crop_mode,
            "crop_fraction": fraction, "size": settings.image_size,
            "channels": settings.channels, "interpolation": settings.interpolation, "scale": "0 to 1",
            "mean": mean, "std": std,
        },
        "task": provenance.get("task"), "step": provenance.get("step"), "data": provenance.get("data"),
        "base_model": init["repo"] if init else None,
        "recipe": recipe, "imported_from": provenance.get("imported_from"), "scores": known_scores(source, scores),
        "fingerprint": fingerprint(exported.encoder),
    }  # fmt: skip


def known_scores(source: str | Path, files: list[Path], encoder: ViTEncoder | None = None) -> dict[str, Any]:
    """Name -> content of score files: the given ones, and that of a fine-tuned run.

    If `encoder` is given, files that identify encoders by fingerprints must include its fingerprint.
    """
    finetuned = Path(source) / "scores.json"
    found: dict[str, Any] = {}
    for file in [*([finetuned] if finetuned.is_file() else []), *files]:
        try:
            content = json.loads(file.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"--scores {file}: not readable as scores ({error}).") from error
        if not isinstance(content, dict):
            raise ValueError(f"--scores {file}: holds a {type(content).__name__}, not scores.")
        if file.name in found:
            raise ValueError(f"--scores {file}: two files of this name. Rename one, so that the card tells them apart.")
        found[file.name] = content
        if encoder is not None and (named := fingerprints_in(content)) and fingerprint(encoder) not in named.values():
            rows = printable(", ".join(named), 80)
            raise ValueError(
                f"--scores {file}: scores of another encoder (its rows {rows} are of other settings or weights). Score "
                "this one (sslvit probe -o FILE), or leave the file out."
            )
    return found


def fingerprints_in(scores: dict[str, Any]) -> dict[str, str]:
    """Row -> fingerprint of its encoder, for rows that have one."""
    about = scores.get("about")
    probed = about.get("probed") if isinstance(about, dict) else None
    rows = probed.items() if isinstance(probed, dict) else ()
    named = {str(row): of.get("fingerprint") for row, of in rows if isinstance(of, dict)}
    return {row: value for row, value in named.items() if isinstance(value, str)}


def hub_header(card: dict[str, Any], name: str) -> dict[str, Any]:
    """The metadata at the top of a card for Hugging Face's Hub; the license is the one given by the author."""
    is_classifier = card["outputs"] == "logits"
    task = [card["task"]] if card["task"] in TASK_SETTINGS else []
    # of imported weights it is not known, and CLIP's or DeiT's have labels
    how = ["self-supervised-learning"] if card["task"] not in (None, "supervised") else []
    header: dict[str, Any] = {
        "license": card["license"], "library_name": LIBRARIES.get(card["format"], "sslvit"),
        "pipeline_tag": "image-classification" if is_classifier else "image-feature-extraction",
        "tags": ["sslvit", "vision-transformer", *how, *task],
    }  # fmt: skip
    results = [result for content in card["scores"].values() if (result := _hub_result(content, card["fingerprint"]))]
    if card["base_model"]:
        header["base_model"] = card["base_model"]
    if results:
        header["model-index"] = [{"name": _plain(name), "results": results}]
    return header


def _hub_result(content: dict[str, Any], fingerprint: str) -> dict[str, Any] | None:
    """This encoder's scores in one file, in the Hub's format; None if the file has no row of it, or one per block."""
    about = content.get("about")
    data = content.get("val") or (about.get("val") if isinstance(about, dict) else None)
    if isinstance(top1 := content.get("top1"), float):
        scores = {"top-1 accuracy": [top1]}
    else:
        rows = [row for row, value in fingerprints_in(content).items() if value == fingerprint]
        scores = read_scores(content.get("rows")).get(rows[0], {}) if len(rows) == 1 else {}
    if not scores or not isinstance(data, str):
        return None
    return {
        "task": {"type": "image-classification"}, "dataset": {"name": _plain(_data_name(data)), "type": "image-folder"},
        "metrics": [
            {"type": "accuracy", "name": _plain(column), "value": round(values[0], 2)}
            for column, values in scores.items()
        ],
    }  # fmt: skip


def _data_name(location: Any) -> str:
    """Folder and split of a data set, and not where they lie on somebody's disk."""
    return "/".join(Path(str(location)).parts[-2:])


def _plain(text: str) -> str:
    """A name from a file, without characters that could act as markup."""
    return re.sub(r"[^\w ,.%=()/+-]", "_", printable(text))


def write_card(card: dict[str, Any], verdict: dict[str, Any], usage: str, folder: Path, name: str) -> None:
    """Write card.json and README.md."""
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    (folder / "README.md").write_text("\n".join(_lines(card, verdict, usage, name)) + "\n")


def _lines(card: dict[str, Any], verdict: dict[str, Any], usage: str, name: str) -> list[str]:
    encoder, prepared = card["encoder"], card["preprocessing"]
    height, width = prepared["size"]
    crop = f"{prepared['crop'][0].upper()}{prepared['crop'][1:]}"
    header = yaml.safe_dump(hub_header(card, name), sort_keys=False, allow_unicode=True, width=1000)
    lines = [
        "---", header.rstrip(), "---", "",
        f"# {markdown_text(name)}", "",
        f"A vision transformer of {in_millions(card['parameters'])} parameters ({encoder['depth']} blocks, width "
        f"{encoder['width']}, {encoder['heads']} heads, patch {encoder['patch']}), written by sslvit {card['sslvit']} "
        f"for {card['format']}. It gives {card['outputs']}.", "",
        "```python", usage, "```", "",
        "## Preprocessing", "",
        f"{crop}, resized to {height} x {width} ({prepared['interpolation']}); pixels from "
        "0 to 1 (8 bits divided by 255, 16 bits by 65,535), minus mean "
        f"{_numbers(prepared['mean'])}, over std {_numbers(prepared['std'])}."
        + (" encoder.preprocess does this." if card["format"] == "safetensors" else ""),
        "It takes images of this size only." if card["image_sizes"] == "fixed"
        else f"It takes other sizes too, in multiples of {encoder['patch']}.", "",
        "## Origin", "",
    ]  # fmt: skip
    origin = {key: markdown_text(card[key]) for key in ("weights", "task", "imported_from") if card[key]}
    which = f", the {origin['weights']}'s weights" if "weights" in origin else ""
    if "task" in origin:
        steps = f", {card['step']:,} steps" if isinstance(card["step"], int) else ""
        lines.append(f"Trained by {origin['task']}{steps}{which}; the recipe stands in card.json.")
    elif "imported_from" in origin:
        lines.append(f"Imported from {origin['imported_from']}{which}.")
    else:
        lines.append("Not known.")
    if isinstance(data := card["data"], dict):
        samples, known = (markdown_text(data.get(key)) for key in ("samples", "fingerprint"))
        lines.append(f"Data: {samples} images, fingerprint {known}.")
    lines += ["", "## Scores", ""]
    for file, content in card["scores"].items():
        lines += [*_scores(file, content, card["fingerprint"]), ""]
    lines += [] if card["scores"] else ["None known.", ""]
    lines += [
        "## Verdict", "",
        f"Reopened in {card['format']} and compared on fixed images: largest difference "
        f"{verdict['largest_difference']:.1e}, allowed {verdict['tolerance']:.0e}; "
        f"{verdict['weights']['compared']} tensors are the same (verdict.json).",
    ]  # fmt: skip
    if card["classes"]:
        lines += ["", "## Classes", "", ", ".join(markdown_text(name) for name in card["classes"])]
    return lines


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _scores(file: str, content: dict[str, Any], fingerprint: str) -> list[str]:
    """The scores of one file as lines: a table if it has rows, and a line that says which row is this encoder's."""
    top1, images = content.get("top1"), content.get("images")
    if isinstance(top1, float) and isinstance(images, int):
        return [f"- {markdown_text(file)}: {top1:.1f} % right of {images:,} images"]
    table = read_scores(content.get("draws")) or read_scores(content.get("rows"))
    if not table:
        return [f"- {markdown_text(file)}: {markdown_text(json.dumps(content))}"]
    named = fingerprints_in(content)
    mine = [markdown_text(row) for row, value in named.items() if value == fingerprint]
    whose = f"this encoder is the row {', '.join(mine)}." if mine else "the file does not name its encoder."
    data, images = scored_data(content)
    of = f" On {markdown_text(_data_name(data))}, {markdown_text(images)} images." if data else ""
    decimals = read_decimals(content)
    return [f"{markdown_text(file)}: {whose}{of}", "", markdown_table(table, 1 if decimals is None else decimals)]
