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

    if Path(options.out).exists():
        raise ValueError(f"{options.out}: already exists. Choose another folder.")
    encoder = load_encoder(options.checkpoint, options.layout, options.heads, **unsaid(options))
    save_encoder(encoder, options.out, provenance_of(options.checkpoint, options.weights))
    print(f"encoder in {options.out}")
