"""Release a run's encoder as zoo:NAME: weights in float16, a model card with scores, and checksums.

    python tools/release_encoder.py runs/mae-60min cifar10/mae-60min --train shards/cifar10/train \
        --val shards/cifar10/val --to exports

The scores are measured with the rounded weights. Encoders with at most 3 MB of weights may be included in the package
(--to sslvit/zoo); others belong in the folder or at the URL that $SSLVIT_ZOO names.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import sslvit
from sslvit import zoo
from sslvit.checkpoint import provenance_of
from sslvit.exporters import export_encoder
from sslvit.exporters.card import OMITTED
from sslvit.files import to_json, write_atomically
from sslvit.models import ViTEncoder
from sslvit.models.resize import resize_weights

PACKAGE_BYTES = 3_000_000  # most bytes of weights of an encoder in the package


def release(run: str, name: str, train: str, val: str, to: str | Path, license: str, size: int | None = None) -> Path:
    """Write the files of an encoder and list it in the zoo's index; with `size`, resize it for other images."""
    folder = Path(to) / name
    encoder = sslvit.load_encoder(run)
    if size is not None:
        settings = replace(encoder.settings, image_size=size)
        weights = resize_weights(encoder.state_dict(), encoder.settings, settings)
        encoder = ViTEncoder(settings).eval()
        encoder.load_state_dict(weights)
    weight_bytes = 2 * sum(value.numel() for value in encoder.state_dict().values())
    if folder.resolve().is_relative_to(zoo.FOLDER.resolve()) and weight_bytes > PACKAGE_BYTES:
        raise ValueError(
            f"{folder}: {weight_bytes:,} bytes of weights are too many for the package. Write it elsewhere: --to FOLDER"
        )
    if folder.exists():
        raise ValueError(f"{folder}: already exists. Delete it, or choose another --to.")
    with torch.no_grad():
        for value in encoder.state_dict().values():  # including buffers
            value.copy_(value.half())
    provenance = provenance_of(run)
    settings = provenance.get("settings") or {}
    provenance["settings"] = {key: value for key, value in settings.items() if key not in OMITTED}
    for data in (provenance["settings"].get("data", {}), provenance.get("data", {})):
        if data.get("shards") is not None:  # without paths of this machine
            data["shards"] = "/".join(Path(data["shards"]).parts[-2:])
    table = sslvit.probe(encoder, train, val, labels_per_class=10, neighbors=[20])
    with tempfile.TemporaryDirectory() as temporary:
        rounded, scores = Path(temporary, name.rpartition("/")[2]), Path(temporary, "probe.json")
        scores.write_text(to_json(table.to_dict(), indent=1))
        sslvit.save_encoder(encoder, rounded, provenance)
        export_encoder(rounded, folder, "safetensors", scores=[scores], license=license)
    file = folder / "encoder.safetensors"
    save_file({key: value.half() for key, value in load_file(file).items()}, file)
    files = {one.name: hashlib.sha256(one.read_bytes()).hexdigest() for one in sorted(folder.iterdir())}
    listed = zoo.encoders() | {name: files}
    write_atomically(zoo.FOLDER / "index.json", json.dumps(dict(sorted(listed.items())), indent=1) + "\n")
    print(table)
    print(f"{folder}: {weight_bytes:,} bytes of weights")
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder, encoder folder or checkpoint file")
    parser.add_argument("name", help="DATA/NAME, such as cifar10/mae-60min")
    parser.add_argument("--train", required=True, help="labeled shards that heads are fitted on")
    parser.add_argument("--val", required=True, help="labeled shards that are scored")
    parser.add_argument("--to", default="exports", help="folder that gets DATA/NAME/")
    parser.add_argument("--license", default="apache-2.0", help="license on the card, in the Hugging Face hub's words")
    parser.add_argument("--size", type=int, help="side of the images that it is for, where that is not the run's")
    given = parser.parse_args()
    release(given.run, given.name, given.train, given.val, given.to, given.license, given.size)
