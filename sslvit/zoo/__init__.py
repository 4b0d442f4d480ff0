"""The encoders in docs/record.md by name, such as zoo:cifar10/dino.

`index.json` lists them with the checksums of their files. Some are in this folder and come with the package; the others
come from the folder or address in $SSLVIT_ZOO. `tools/release_encoder.py` adds an encoder.
"""

from __future__ import annotations

import difflib
import hashlib
import http.client
import json
import os
import urllib.request
from pathlib import Path

from sslvit.files import cache_folder, expand_path, printable, write_atomically

ZOO = "zoo:"
LOCATION = "SSLVIT_ZOO"  # environment variable: folder or address of encoders that are not in the package
FOLDER = Path(__file__).parent
CACHE = "~/.cache/sslvit/zoo"
TIMEOUT_SECONDS = 60.0  # without receiving data
MAX_BYTES = 2**26  # per file; the checksum of a larger file does not match


def is_name(source: str | Path) -> bool:
    """Whether a source is the name of one of these encoders."""
    return str(source).startswith(ZOO)


def encoders() -> dict[str, dict[str, str]]:
    """Name -> file -> SHA-256 of its content."""
    return json.loads((FOLDER / "index.json").read_text())


def find(source: str) -> Path:
    """The folder with the files of an encoder, downloaded if necessary.

    Raises:
        ValueError: There is no encoder with this name, or a file differs from the released one.
        FileNotFoundError: It does not come with the package, and its location is unset or does not have it.
    """
    name, known = source.removeprefix(ZOO), encoders()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        raise ValueError(
            f"{printable(source)}: no such encoder. There are {', '.join(ZOO + one for one in known)}; the nearest is "
            f"{ZOO}{near[0]}."
        )
    folder, files = FOLDER / name, known[name]
    if not folder.is_dir():
        folder = _external_folder(name, files)
    for file, digest in files.items():
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file}: no such file. {LOCATION} names the folder that holds {name}/.")
        if not _is_released(folder / file, digest):
            raise ValueError(
                f"{folder / file}: not the file that was released as {ZOO}{name} (its SHA-256 differs). Delete it, and "
                "download it again."
            )
    return folder


def _is_released(file: Path, digest: str) -> bool:
    return file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == digest


def _external_folder(name: str, files: dict[str, str]) -> Path:
    """The folder of an encoder that does not come with the package: the user's, or the cache of downloads."""
    location, cached = os.environ.get(LOCATION), cache_folder(CACHE) / name
    if location and "://" not in location:
        return Path(expand_path(location)) / name
    missing = [file for file, digest in files.items() if not _is_released(cached / file, digest)]
    if missing and not location:
        raise FileNotFoundError(
            f"{ZOO}{name}: does not come with the package. Set {LOCATION} to the folder or address that has {name}/."
        )
    for file in missing:
        address = f"{str(location).rstrip('/')}/{name}/{file}"
        content = _download(address)
        if hashlib.sha256(content).hexdigest() != files[file]:
            raise ValueError(
                f"{printable(address)}: not the file that was released as {ZOO}{name} (its SHA-256 differs). Check "
                f"{LOCATION}."
            )
        cached.mkdir(parents=True, exist_ok=True)
        write_atomically(cached / file, content)
    return cached


def _download(address: str) -> bytes:
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT_SECONDS) as answer:  # the user's own address
            return answer.read(MAX_BYTES)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise FileNotFoundError(
            f"{printable(address)}: could not be downloaded ({printable(error, 160)}). Check {LOCATION}."
        ) from error
