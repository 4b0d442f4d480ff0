"""Encoder -> the formats of other libraries, each reopened and compared before success is reported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sslvit.checkpoint import load_encoder
from sslvit.export import onnx, safetensors, timm, torch, transformers
from sslvit.export.card import known_scores, make_card, write_card
from sslvit.export.exported import with_outputs
from sslvit.export.verify import check_inputs, compare, compare_preprocessing

FORMATS = {"timm": timm, "transformers": transformers, "onnx": onnx, "torch": torch, "safetensors": safetensors}
MARK = "verdict.json"


def export_encoder(
    source: str | Path,
    out: str | Path,
    kind: str,
    outputs: str = "features",
    size: str | None = None,
    weights: str | None = None,
    scores: Sequence[str | Path] = (),
    overwrite: bool = False,
    **released: Any,
) -> dict[str, Any]:
    """Write an encoder in another library's format, reopen it there and compare its outputs.

    Args:
        source: anything that load_encoder takes.
        out: folder to write.
        kind: timm, transformers, onnx, torch or safetensors.
        outputs: tokens (the encoder alone), features (pooled) or logits (a fine-tuned run's classifier).
        size: fixed (images of the training size) or dynamic (any that the patch divides); None for dynamic where timm
            and transformers stretch positions as this encoder does, and for fixed with onnx and torch.
        weights: student or teacher, of a checkpoint that holds both.
        scores: files of scores for the card.
        overwrite: replace an earlier export there.
        released: what a released file does not say (layout, heads, image_size, palette).

    Returns:
        The verdict, which also lies in verdict.json.

    Raises:
        ValueError: the folder is in use, the format is unknown or cannot hold the encoder.
        RuntimeError: what was written gives other outputs; it stays in OUT.part, with the verdict.
    """
    out = Path(out)
    if kind not in FORMATS:
        raise ValueError(f"--format {kind}: not one of {', '.join(FORMATS)}.")
    if out.exists() and (out.is_file() or any(out.iterdir())):
        if not overwrite:
            raise ValueError(f"{out}: already exists. Choose another folder, or pass --overwrite.")
        if not (out / MARK).exists():
            raise ValueError(f"{out}: not an earlier export (no {MARK}), so --overwrite leaves it alone.")
    known_scores(source, [Path(file) for file in scores])
    exported = with_outputs(load_encoder(source, weights=weights, **released), source, outputs)
    writer = FORMATS[kind]
    is_fixed = writer.check(exported, size)
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    writer.write(exported, part, is_fixed)
    verdict: dict[str, Any] = {"format": kind, "outputs": outputs, "image_sizes": "fixed" if is_fixed else "any"}
    verdict |= compare(exported, writer.reopen(part, exported, is_fixed), check_inputs(exported.settings, is_fixed))
    if hasattr(writer, "preprocessing") and exported.settings.tokens != "pixel":
        verdict["preprocessing"] = compare_preprocessing(exported, writer.preprocessing(part, exported))
    (part / MARK).write_text(json.dumps(verdict, indent=1) + "\n")
    for what, found in (
        ("the reopened encoder", verdict),
        ("its preprocessing", verdict.get("preprocessing", verdict)),
    ):
        if not found["passed"]:
            raise RuntimeError(
                f"{out}: not written, because {what} differs by {found['largest_difference']:.1e} "
                f"(allowed {found['tolerance']:.0e}); what was tried is in {part}."
            )
    card = make_card(exported, source, kind, is_fixed, weights, [Path(file) for file in scores])
    write_card(card, verdict, writer.how_to_open(exported, is_fixed).replace("FOLDER", str(out)), part, out.name)
    if out.exists():
        shutil.rmtree(out)
    part.rename(out)
    return verdict
