"""Encoder -> the formats of other libraries, each reopened and compared before success is reported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from sslvit.checkpoint import load_encoder
from sslvit.export import safetensors, timm
from sslvit.export.verify import check_inputs, compare

FORMATS = {"safetensors": safetensors, "timm": timm}


def export_encoder(source: str | Path, out: str | Path, kind: str, overwrite: bool = False) -> dict[str, Any]:
    """Write an encoder in another library's format, reopen it there and compare its outputs.

    Args:
        source: anything that load_encoder takes.
        out: folder to write.
        kind: timm or safetensors.
        overwrite: replace an earlier export there.

    Returns:
        The verdict, which also lies in verdict.json.

    Raises:
        ValueError: the folder is in use, the format is unknown or cannot hold the encoder.
        RuntimeError: what was written gives other outputs; it stays in OUT.part, with the verdict.
    """
    out = Path(out)
    if kind not in FORMATS:
        raise ValueError(f"--format {kind}: not one of {', '.join(FORMATS)}.")
    if out.exists() and any(out.iterdir()):
        if not overwrite:
            raise ValueError(f"{out}: already exists. Choose another folder, or pass --overwrite.")
        if not (out / "verdict.json").exists():
            raise ValueError(f"{out}: not an earlier export (no verdict.json), so --overwrite leaves it alone.")
    encoder = load_encoder(source)
    writer = FORMATS[kind]
    writer.check(encoder.settings)
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    writer.write(encoder, part)
    verdict = {"format": kind, **compare(encoder, writer.reopen(part), check_inputs(encoder.settings))}
    (part / "verdict.json").write_text(json.dumps(verdict, indent=1) + "\n")
    if not verdict["passed"]:
        raise RuntimeError(
            f"{out}: not written, because the reopened encoder differs by {verdict['largest_difference']:.1e} "
            f"(allowed {verdict['tolerance']:.0e}); what was tried is in {part}."
        )
    if out.exists():
        shutil.rmtree(out)
    part.rename(out)
    return verdict
