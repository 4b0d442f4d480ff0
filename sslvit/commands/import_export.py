"""Importing encoders from other libraries and exporting to them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from sslvit.commands.files import foreign_overrides, report
from sslvit.commands.options import Encoder, File, FromFile, Reported
from sslvit.settings.choices import Arg


@dataclass(kw_only=True)
class ExportOptions(Reported, Encoder):
    """Export an encoder for another library, and verify that its outputs match there.

    Example: sslvit export runs/mae exports/timm --format timm
    """

    out: Annotated[str, Arg("OUT", position=2)]
    """Folder for the export."""
    format: str
    """Library or file format: timm, transformers, onnx, torch (a torch.export program), safetensors, or a plugin's
    format, PACKAGE.MODULE:NAME."""
    outputs: Literal["tokens", "features", "logits", "reconstruction"] = "features"
    """Output: the encoder's tokens, pooled features, a classifier's logits, or the patches that an MAE run predicts
    (includes its decoder; --format transformers only)."""
    size: Literal["fixed", "dynamic"] | None = None
    """Image sizes that the export accepts; null for dynamic with timm and transformers if they interpolate positions
    like this encoder, otherwise fixed."""
    scores: Annotated[list[str], File] = field(default_factory=list)
    """Files with scores for the model card, as written by `probe -o`."""
    license: str | None = None
    """License on the model card, by its identifier on the Hugging Face hub: apache-2.0, mit, cc-by-nc-4.0."""
    push: Annotated[str | None, Arg("ORG/NAME")] = None
    """Model on the Hugging Face hub to which the export is committed; created if it does not exist."""
    private: bool = False
    """Create a new model on the hub as private."""
    overwrite: bool = False
    """Replace an earlier export in the folder and, with --push, files of the same names on the hub."""


def run_export(options: ExportOptions) -> None:
    """Export an encoder, and print the difference between its outputs and the original's."""
    from sslvit.api import export

    given = {"layout": options.layout, "heads": options.heads, **foreign_overrides(options)}
    made = export(
        options.encoder, options.out, options.format, outputs=options.outputs, size=options.size,
        scores=options.scores, license=options.license, push=options.push, private=options.private,
        overwrite=options.overwrite, **given,
    )  # fmt: skip
    report(options, str(made), made.to_dict())


@dataclass(kw_only=True)
class ImportOptions(Reported, FromFile):
    """Import released weights into an encoder folder.

    Example: sslvit import mae_pretrain_vit_base.pth encoders/mae --heads 12
    """

    checkpoint: Annotated[str, Arg("CHECKPOINT", position=1)]
    """File or folder of weights."""
    out: Annotated[str, Arg("OUT", position=2)]
    """Folder for the encoder."""


def run_import(options: ImportOptions) -> None:
    """Write an encoder folder from released weights."""
    from sslvit.checkpoint import load_encoder, provenance_of, save_encoder
    from sslvit.exporters import destination

    out = Path(options.out)
    destination.check(out, may_overwrite=False)
    encoder = load_encoder(options.checkpoint, options.layout, options.heads, **foreign_overrides(options))
    temporary = destination.make_temporary(out)
    with destination.complete_or_removed(temporary):
        save_encoder(encoder, temporary, provenance_of(options.checkpoint, options.weights))
    destination.move_into_place(temporary, out)
    report(options, f"encoder in {out}", {"encoder": str(out)})
