"""The encoders of docs/record.md by name, such as zoo:cifar10/dino-30min.

`index.json` lists them with the checksums of their files. Some lie in this folder and come with the package; the others
are taken from the folder or address in $SSLVIT_ZOO. `tools/release_encoder.py` adds one.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from pathlib import Path

import torch

from sslvit.files import cache_folder, expand_path, printable

ZOO = "zoo:"
LOCATION = "SSLVIT_ZOO"  # environment variable: folder or address of the encoders that do not come with the package
FOLDER = Path(__file__).parent
CACHE = "~/.cache/sslvit/zoo"


def is_name(source: str | Path) -> bool:
    """Whether a source is the name of one of these encoders."""
    return str(source).startswith(ZOO)


def encoders() -> dict[str, dict[str, str]]:
    """Name -> file -> SHA-256 of its content."""
    return json.loads((FOLDER / "index.json").read_text())


def find(source: str) -> Path:
    """The folder of an encoder with its files, downloaded if they have to be.

    Raises:
        ValueError: There is no encoder of this name, or a file is not the one that was released.
        FileNotFoundError: It does not come with the package, and nothing says where it is, or it is not there.
    """
    name, known = source.removeprefix(ZOO), encoders()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        raise ValueError(
            f"{printable(source)}: no such encoder. There are {', '.join(ZOO + one for one in known)}; the nearest is "
            f"{ZOO}{near[0]}."
        )
    folder = FOLDER / name
    if not folder.is_dir():
        folder = _elsewhere(name, known[name])
    for file, digest in known[name].items():
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file}: no such file. {LOCATION} names the folder that holds {name}/.")
        if hashlib.sha256((folder / file).read_bytes()).hexdigest() != digest:
            raise ValueError(
                f"{folder / file}: not the file that was released as {ZOO}{name} (its SHA-256 differs). Delete it, and "
                "take it anew."
            )
    return folder


def _elsewhere(name: str, files: dict[str, str]) -> Path:
    """The folder of an encoder that does not come with the package, which an address is downloaded to."""
    location = os.environ.get(LOCATION)
    if not location:
        raise FileNotFoundError(
            f"{ZOO}{name}: does not come with the package. Set {LOCATION} to the folder or address that has {name}/."
        )
    if "://" not in location:
        return Path(expand_path(location)) / name
    folder = cache_folder(CACHE) / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, digest in files.items():
        if not (folder / file).is_file():
            address = f"{location.rstrip('/')}/{name}/{file}"
            try:
                torch.hub.download_url_to_file(address, str(folder / file), hash_prefix=digest, progress=False)
            except Exception as error:  # of the network, of an address, or another file than the one released
                reason = printable(str(error), 160) or type(error).__name__
                raise FileNotFoundError(f"{printable(address)}: not to be had ({reason}). Check {LOCATION}.") from error
    return folder
