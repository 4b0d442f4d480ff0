"""Models of the Hugging Face hub by name: hf:ORG/NAME, or hf:ORG/NAME@REVISION for a branch, a tag or a commit."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sslvit.environment import require_packages
from sslvit.files import printable
from sslvit.progress import quiet_libraries, track_counter

HUB = "hf:"
NAME = re.compile(r"hf:(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?")
SAFE, PICKLED = ["*.json", "*.safetensors"], ["*.json", "pytorch_model*.bin"]


def is_name(source: str | Path) -> bool:
    """Whether a source is the name of a model of the hub."""
    return str(source).startswith(HUB)


def snapshot(source: str) -> Path:
    """The folder of a model in the hub's cache, with config and weights, downloaded if necessary.

    Weights are read from safetensors, or, if there are none, from older pickle files, restricted to tensors.

    Raises:
        ValueError: The name is malformed, or the model is neither in the cache nor available from the hub.
        ImportError: huggingface_hub is not installed.
    """
    name = NAME.fullmatch(source)
    if name is None:
        raise ValueError(f"{printable(source)}: expected hf:ORG/NAME, or hf:ORG/NAME@REVISION.")
    require_packages(source, "sslvit[transformers]", "huggingface_hub")
    found = _download(source, name["repo"], name["revision"], SAFE)
    if not any(found.glob("*.safetensors")):
        found = _download(source, name["repo"], name["revision"], PICKLED)
    return found


@contextmanager
def downloads_shown(what: str) -> Iterator[None]:
    """While the block runs, show how much the hub's library has downloaded, instead of its own progress bars."""
    from huggingface_hub.constants import HF_HUB_CACHE

    began, cache = time.time(), Path(HF_HUB_CACHE)

    def megabytes() -> int:
        written = 0
        for path in cache.glob("models--*/blobs/*.incomplete"):
            with suppress(OSError):  # the download has finished, and the file was renamed
                about = path.stat()
                written += about.st_size if about.st_mtime >= began else 0
        return written // 10**6

    with quiet_libraries(), track_counter(f"downloading {printable(what)}", None, "MB", megabytes):
        yield


def _download(source: str, repo: str, revision: str | None, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        with downloads_shown(source):
            return Path(snapshot_download(repo, revision=revision, allow_patterns=files))
    except Exception as error:  # from the hub, its cache or any HTTP library
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"{source}: neither in the hub's cache nor to be had from it ({printable(reason, 160)}). Check name and "
            "revision, log in (hf auth login) for a gated model, or give a folder that was downloaded elsewhere."
        ) from error
