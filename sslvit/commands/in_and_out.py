"""Encoders from and to other libraries."""

from __future__ import annotations

import argparse
from pathlib import Path

from sslvit.commands.files import unsaid


def run_export(options: argparse.Namespace) -> None:
    from sslvit.export import export_encoder

    verdict = export_encoder(options.encoder, options.out, options.format, options.overwrite)
    print(
        f"{options.out}: reopened in {options.format} and compared; largest difference "
        f"{verdict['largest_difference']:.1e} (allowed {verdict['tolerance']:.0e})"
    )


def run_import(options: argparse.Namespace) -> None:
    from sslvit.checkpoint import load_encoder, save_encoder

    if Path(options.out).exists():
        raise ValueError(f"{options.out}: already exists. Choose another folder.")
    encoder = load_encoder(options.checkpoint, options.layout, options.heads, **unsaid(options))
    save_encoder(encoder, options.out, {"imported_from": Path(options.checkpoint).name})
    print(f"encoder in {options.out}")
