"""Export encoders to the formats of other libraries; each is reopened and compared before success is reported."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from PIL.Image import Image
from torch import Tensor

from sslvit.checkpoint import load_encoder
from sslvit.exporters import destination, onnx, safetensors, timm, torch, transformers, verify
from sslvit.exporters.card import CARD, known_scores, make_card, write_card
from sslvit.exporters.cropping import IMAGE_CHANNELS
from sslvit.exporters.destination import IN_PROGRESS, VERDICT, complete_or_removed, is_write_failure
from sslvit.exporters.exported import Exported, Reopened, with_outputs
from sslvit.exporters.hub import hub_license
from sslvit.files import to_json
from sslvit.models import Backbone
from sslvit.plugins import find_plugin
from sslvit.progress import quiet_libraries, track
from sslvit.results import Result


class Exporter(Protocol):
    """An export format. A module of this package with these functions is an exporter."""

    def check(self, exported: Exported, size: str | None) -> bool:
        """Whether images have one size only; refuses unsupported encoders. `size`: fixed, dynamic or None (either)."""

    def write(self, exported: Exported, folder: Path, is_fixed: bool) -> None:
        """Write the files into an empty folder."""

    def reopen(self, folder: Path, exported: Exported) -> Reopened:
        """Load the export in its own library."""

    def weights(self, folder: Path, exported: Exported) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Expected tensors, and the tensors in the library, under the same names."""

    def usage(self, exported: Exported, is_fixed: bool) -> str:
        """Lines of Python that load the export in its folder and apply it to photo.jpg there."""


@runtime_checkable
class Preprocesses(Protocol):
    """An exporter for a library that has its own image preprocessing."""

    def preprocessing(self, folder: Path, exported: Exported) -> Callable[[Image], Tensor]:
        """The library's preprocessing of an image."""


@runtime_checkable
class FoldsWeights(Protocol):
    """An exporter that renames or merges tensors, so that these are verified through the outputs."""

    def reopen_with_unit_scale(self, folder: Path, exported: Exported) -> Reopened:
        """The program with every LayerScale set to one, so that every block affects the outputs."""


@dataclass(repr=False)
class Export(Result):
    """An encoder in another library's format, reopened there and compared.

    Args:
        path: The folder.
        verdict: The comparison with the original encoder, which is also in verdict.json.
        pushed: Address of the commit on the Hugging Face hub, if it was pushed there.
    """

    path: Path
    verdict: dict[str, Any]
    pushed: str | None = None

    def text(self) -> str:
        """The verdict in one line."""
        found = self.verdict
        return (
            f"{self.path}: reopened in {found['format']} and compared; largest difference "
            f"{found['largest_difference']:.1e} (allowed {found['tolerance']:.0e}); images of "
            f"{'one size' if found['image_sizes'] == 'fixed' else 'any size'}"
            + (f"\npushed: {self.pushed}" if self.pushed else "")
        )

    def to_dict(self) -> dict[str, Any]:
        """The verdict, and the address of the pushed commit."""
        return self.verdict | ({"pushed": self.pushed} if self.pushed else {})


EXPORTERS: dict[str, Exporter] = {
    "timm": timm, "transformers": transformers, "onnx": onnx, "torch": torch, "safetensors": safetensors,
}  # fmt: skip

EXPORTER_FUNCTIONS = ("check", "write", "reopen", "weights", "usage")


def find_exporter(name: str) -> Exporter:
    """Look up an exporter by name, including exporters of plugins."""
    if name in EXPORTERS:
        return EXPORTERS[name]
    exporter: Exporter | None = find_plugin("--format", name)
    if exporter is None:
        raise ValueError(f"--format {name}: not one of {', '.join(EXPORTERS)}.")
    if missing := [function for function in EXPORTER_FUNCTIONS if not hasattr(exporter, function)]:
        raise ValueError(f"--format {name}: not an exporter (no {', '.join(missing)}; see sslvit.exporters.Exporter).")
    return exporter


def export_encoder(
    source: str | Path,
    out: str | Path,
    kind: str,
    outputs: str = "features",
    size: str | None = None,
    weights: str | None = None,
    scores: Sequence[str | Path] = (),
    license: str | None = None,
    overwrite: bool = False,
    **overrides: Any,
) -> dict[str, Any]:
    """Write an encoder in another library's format, reopen it there and compare its outputs.

    Args:
        source: Anything that load_encoder accepts.
        out: The folder to write.
        kind: timm, transformers, onnx, torch or safetensors, or an import path.
        outputs: tokens (the encoder alone), features (pooled), logits (a fine-tuned run's classifier) or reconstruction
            (patches predicted by an MAE run, including its decoder; only with transformers).
        size: fixed (images of the training size) or dynamic (any multiples of the patch). None means dynamic if timm or
            transformers resamples positions as this encoder does, otherwise fixed; for onnx and torch, it means fixed.
        weights: student or teacher, for a checkpoint that has both.
        scores: Files of scores for the card.
        license: The license on the card, by its identifier on the Hugging Face hub.
        overwrite: Whether to replace an earlier export there.
        overrides: Settings that a released file does not state (layout, heads, image_size, palette).

    Returns:
        The verdict, which is also in verdict.json.

    Raises:
        ValueError: The folder is in use, the format is unknown or does not support the encoder, or scores belong to
            another encoder.
        WriteError: The disk is full or not writable; nothing is left behind.
        RuntimeError: The export failed, or its outputs differ; it stays in OUT.part, with the verdict.
    """
    out, files, license = Path(os.path.abspath(out)), [Path(file) for file in scores], hub_license(license)
    exporter = find_exporter(kind)
    if outputs == "reconstruction" and exporter is not transformers:
        raise ValueError(f"--outputs reconstruction: {kind} has no decoder of MAE. Use --format transformers.")
    if size not in (None, "fixed", "dynamic"):
        raise ValueError(f"--size {size}: not one of fixed, dynamic.")
    destination.check(out, overwrite)
    known_scores(source, files)
    encoder = load_encoder(source, weights=weights, **overrides)
    if isinstance(encoder, Backbone):
        raise ValueError(
            f"--format {kind}: takes a vision transformer of sslvit, and this is {encoder.name}. In Python, "
            f"torch.save(sslvit.load_encoder({str(source)!r}).net.state_dict(), FILE) saves its weights with the "
            "names of its library."
        )
    exported = with_outputs(encoder, source, outputs, weights)
    known_scores(source, files, exported.encoder)
    is_fixed = exporter.check(exported, size)
    temporary = destination.make_temporary(out)
    verdict: dict[str, Any] = {"format": kind, "outputs": outputs, "image_sizes": "fixed" if is_fixed else "any"}
    with complete_or_removed(temporary), quiet_libraries():
        failure = _write_and_verify(exporter, exported, temporary, is_fixed, verdict)
        verdict["passed"] = not failure
        written = (path.name for path in temporary.iterdir() if path.name != IN_PROGRESS)
        verdict["files"] = sorted([*written, VERDICT, *CARD])
        (temporary / VERDICT).write_text(to_json(verdict, indent=1) + "\n")
        if failure:
            raise RuntimeError(f"{out}: not written, because {failure}; what was tried is in {temporary}.")
        card = make_card(exported, source, kind, is_fixed, files, license)
        write_card(card, verdict, exporter.usage(exported, is_fixed), temporary, out.name)
    destination.move_into_place(temporary, out)
    return verdict


def _write_and_verify(
    exporter: Exporter, exported: Exported, temporary: Path, is_fixed: bool, verdict: dict[str, Any]
) -> str:
    """Write, reopen and compare; adds the results to the verdict. Returns the reason for a failure, else ""."""
    try:
        for stage in track(("write", "reopen", "compare"), "exporting", 3, "stages"):
            if stage == "write":
                exporter.write(exported, temporary, is_fixed)
            elif stage == "reopen":
                reopened = exporter.reopen(temporary, exported)
            else:
                inputs = verify.check_inputs(exported.settings, is_fixed)
                verdict |= verify.compare(exported, reopened, inputs)
        verdict["weights"] = verify.compare_weights(*exporter.weights(temporary, exported))
        if isinstance(exporter, FoldsWeights) and exported.settings.layer_scale is not None:
            rescaled = exporter.reopen_with_unit_scale(temporary, exported)
            verdict["unit_layer_scale"] = verify.compare(verify.with_unit_scale(exported), rescaled, inputs)
        if isinstance(exporter, Preprocesses) and exported.settings.channels in IMAGE_CHANNELS:
            preprocessing = exporter.preprocessing(temporary, exported)
            verdict["preprocessing"] = verify.compare_preprocessing(exported, preprocessing)
    except Exception as error:  # other libraries may raise anything
        if is_write_failure(error):
            raise
        failure = " ".join(str(error).split())[:300] or type(error).__name__
        verdict |= {"passed": False, "failure": failure}
        return failure
    comparisons = {
        "the reopened encoder": verdict, "with every LayerScale set to one it": verdict.get("unit_layer_scale", {}),
        "among its weights": verdict["weights"], "its preprocessing": verdict.get("preprocessing", {}),
    }  # fmt: skip
    failed = ((what, found) for what, found in comparisons.items() if found.get("passed") is False)
    return next((f"{what} {verify.shortfall(found)}" for what, found in failed), "")
