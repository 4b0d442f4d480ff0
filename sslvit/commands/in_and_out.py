"""Encoders from and to other libraries."""

from __future__ import annotations

import argparse
from pathlib import Path

from sslvit.commands.files import unsaid


def run_export(options: argparse.Namespace) -> None:
    from sslvit.export import export_encoder

    given = {"layout": options.layout, "heads": options.heads, **unsaid(options)}
    verdict = export_encoder(
        options.encoder, options.out, options.format, options.outputs, options.size, scores=options.scores,
        overwrite=options.overwrite, **given,
    )  # fmt: skip
    print(
        f"{options.out}: reopened in {options.format} and compared; largest difference "
        f"{verdict['largest_difference']:.1e} (allowed {verdict['tolerance']:.0e}); images of "
        f"{'one size' if verdict['image_sizes'] == 'fixed' else 'any size'}"
    )


def run_import(options: argparse.Namespace) -> None:
    from sslvit.checkpoint import load_encoder, provenance_of, save_encoder
    from sslvit.export import destination

    out = Path(options.out)
    destination.check(out, may_overwrite=False)
    encoder = load_encoder(options.checkpoint, options.layout, options.heads, **unsaid(options))
    part = destination.make_part(out)
    with destination.complete_or_removed(part):
        save_encoder(encoder, part, provenance_of(options.checkpoint, options.weights))
    destination.move_into_place(part, out)
    print(f"encoder in {out}")
