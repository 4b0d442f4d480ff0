"""Push an export to the Hugging Face hub, with all files in one commit."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sslvit.environment import require_packages
from sslvit.files import bytes_text, printable
from sslvit.progress import quiet_libraries

logger = logging.getLogger(__name__)

NAME = re.compile(r"[\w.-]+/[\w.-]+")
OWN = ".gitattributes"  # the hub adds this file to every new model


def check(repo: str, overwrite: bool) -> None:
    """Refuse, before any work, a model that cannot be pushed to.

    Args:
        repo: ORG/NAME of the model.
        overwrite: Whether existing files may be replaced.

    Raises:
        ValueError: The name is malformed, the user is not logged in, the hub does not answer, or the model already has
            files.
        ImportError: huggingface_hub is not installed.
    """
    if not NAME.fullmatch(repo):
        raise ValueError(f"--push {printable(repo)}: expected ORG/NAME.")
    require_packages(f"--push {repo}", "sslvit[transformers]", "huggingface_hub")
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise ValueError(f"--push {repo}: not logged in. Run hf auth login, or set HF_TOKEN.")
    with _in_one_line(repo, "Check the name, the token (hf auth whoami) and the network, or leave --push out."):
        api = HfApi()
        found = [name for name in api.list_repo_files(repo) if name != OWN] if api.repo_exists(repo) else []
    if found and not overwrite:
        raise ValueError(
            f"--push {repo}: has {len(found)} files ({printable(', '.join(found), 60)}). Choose another name, or "
            "pass --overwrite to replace those of the same names."
        )


def push(folder: Path, files: Sequence[str], repo: str, is_private: bool, message: str) -> str:
    """Push an export in one commit; creates the model if it does not exist.

    Args:
        folder: The export.
        files: Names of its files.
        repo: ORG/NAME of the model.
        is_private: Whether a new model is private.
        message: The commit message.

    Returns:
        The address of the commit.

    Raises:
        ValueError: The hub refuses the commit or does not answer; the folder stays.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api, size = HfApi(), sum((folder / name).stat().st_size for name in files)
    logger.info(f"pushing {bytes_text(size)} to {repo}")
    with _in_one_line(repo, f"The export is complete in {folder}; once that is put right: hf upload {repo} {folder}"):
        api.create_repo(repo, private=is_private or None, exist_ok=True)
        additions = [CommitOperationAdd(name, folder / name) for name in files]
        return str(api.create_commit(repo, additions, commit_message=message).commit_url)


def hub_license(name: str | None) -> str:
    """The hub's identifier of a license, `unknown` if none is given.

    Raises:
        ValueError: It cannot be an identifier of the hub.
    """
    if name is None:
        return "unknown"
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name):
        raise ValueError(f"--license {printable(name)}: expected the hub's word for it, such as apache-2.0 or mit.")
    return name


@contextmanager
def _in_one_line(repo: str, remedy: str) -> Iterator[None]:
    """Convert exceptions of the hub's library to a ValueError of one line."""
    try:
        with quiet_libraries():
            yield
    except Exception as error:  # from the hub or any HTTP library
        reason = " ".join(_reasons(error)) or type(error).__name__
        raise ValueError(f"--push {repo}: {printable(reason, 200)}. {remedy}") from error


def _reasons(error: Exception) -> list[str]:
    """The lines of a message, without blank lines and request IDs."""
    lines = [line.strip(" .") for line in str(error).splitlines()]
    return [line for line in lines if line and not line.startswith(("(Request ID", "- (Request ID"))]
