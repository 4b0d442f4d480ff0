"""Samples from a folder of images: class folders or one flat folder; skipped files are counted and reported."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from sslvit.data.header import EXTRAS, IMAGE_SUFFIXES
from sslvit.data.index import sets_below
from sslvit.data.labels import NO_LABEL, brief_names, sorted_names
from sslvit.data.sources import FileImages, ImageSource, Sample
from sslvit.files import expand_path, printable
from sslvit.progress import track_counter

SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"}
# files and folders left by operating systems and archives
SYSTEM_NAMES = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found",
                "Thumbs.db", "desktop.ini"}  # fmt: skip


@dataclass
class _Skipped:
    """Files and folders skipped while listing a folder.

    Args:
        endings: Number of files that are not images, by file ending.
        system: Number of hidden and system files and folders, by name.
        reasons: Path of any other skipped entry -> reason.
    """

    endings: Counter = field(default_factory=Counter)
    system: Counter = field(default_factory=Counter)
    reasons: dict[str, str] = field(default_factory=dict)


def folder_source(source: Path) -> ImageSource:
    """List the images of a folder, sorted by name, with the folder names as classes if there are folders.

    Links to folders are followed. Hidden and system files are skipped; a folder without images is not a class.

    Raises:
        ValueError: there are no images, images lie beside folders of images, or the folders are splits, not classes.
    """
    if not source.is_dir():
        raise ValueError(f"{printable(source)}: no such folder.")
    skipped, files = _Skipped(), FileImages()
    top_level: list[Sample] = []
    classes: dict[str, list[Sample]] = {}
    empty = []
    with track_counter(f"looking through {printable(source)}", None) as counter:

        def sample_of(path: str) -> Sample:
            counter.tick()
            return _sample(files, path, source)

        above = (os.path.realpath(source),)
        for entry in _entries(source, skipped):
            if _is_folder(entry):
                images = [sample_of(path) for path in _images_below(entry.path, source, skipped, above)]
                if images:
                    classes[entry.name] = images
                else:
                    empty.append(entry.name)
            elif _is_image(entry, source, skipped):
                top_level.append(sample_of(entry.path))
    if top_level and classes:
        raise ValueError(
            f"{printable(source)}: holds images ({printable(top_level[0].key + top_level[0].suffix)}, ...) beside "
            f"folders of images ({brief_names(classes, 3)}). Either one folder per class, or all images side by side."
        )
    if not top_level and not classes:
        raise ValueError(f"{printable(source)}: no images there {_contents(source, skipped)}.")
    splits = [name for name in classes if name.lower() in SPLITS]
    if splits and len(splits) == len(classes):
        commands = "; ".join(
            f"sslvit shards pack {printable(source / name)} SHARDS/{printable(name)}" for name in splits
        )
        raise ValueError(
            f"{printable(source)}: {' and '.join(f'{printable(name)}/' for name in splits)} look like splits, not "
            f"classes. Take each by itself: {commands}"
        )
    names = sorted_names(classes)
    for label, name in enumerate(names):
        for sample in classes[name]:
            sample.label = label
    notes = _notes(skipped, empty)
    if splits:
        notes.append(f"{brief_names(splits)} {'is' if len(splits) == 1 else 'are'} taken for classes like the others")
    samples = top_level + [sample for name in names for sample in classes[name]]
    return ImageSource(samples, names or None, _skipped(skipped, empty), notes)


def check_labeled(option: str, source: str | Path | None) -> None:
    """Reject a flat image folder where labels are needed, before it is packed.

    Args:
        option: Option that named the source, for the message.
        source: The source; anything but an image folder passes.

    Raises:
        ValueError: the images do not lie in class folders.
    """
    folder = Path(expand_path(source or ""))
    if not source or not folder.is_dir() or (folder / "index.json").exists() or any(folder.glob("*.tar")):
        return
    skipped = _Skipped()
    entries = _entries(folder, skipped)
    if not any(map(_is_folder, entries)) and any(_is_image(entry, folder, skipped) for entry in entries):
        raise ValueError(
            f"{option} {printable(source)}: images side by side have no labels. Give one folder per class, or pack a "
            "list with a column label (sslvit shards pack LIST.csv SHARDS); without labels, see what the encoder finds "
            f"alike: sslvit show neighbors ENCODER {printable(source)}"
        )


def first_image(folder: Path) -> str | None:
    """Name of the first image in a folder or in one of its folders; None if there is none."""
    skipped = _Skipped()
    with suppress(ValueError):  # a folder that is not readable
        for entry in _entries(folder, skipped):
            below = _entries(entry.path, skipped) if _is_folder(entry) else [entry]
            if image := next((one for one in below if _is_image(one, folder, skipped)), None):
                return os.path.relpath(image.path, folder)
    return None


def _entries(folder: str | Path, skipped: _Skipped) -> list[os.DirEntry]:
    """The entries of a folder, sorted by name, without hidden and system files."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(f"{printable(folder)}: not readable ({error.strerror}). Check its permissions.") from error
    kept = []
    for entry in entries:
        if entry.name.startswith(".") or entry.name in SYSTEM_NAMES:
            skipped.system[entry.name] += 1
        else:
            kept.append(entry)
    return kept


def _images_below(folder: str, root: Path, skipped: _Skipped, above: tuple[str, ...]) -> Iterator[str]:
    """Paths of all images at any depth, sorted by name."""
    real = os.path.realpath(folder)
    if real in above:
        skipped.reasons[os.path.relpath(folder, root)] = "a link to a folder above it"
        return
    for entry in _entries(folder, skipped):
        if _is_folder(entry):
            yield from _images_below(entry.path, root, skipped, (*above, real))
        elif _is_image(entry, root, skipped):
            yield entry.path


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads back to itself
        return False


def _is_image(entry: os.DirEntry, root: Path, skipped: _Skipped) -> bool:
    """Whether an entry is an image by its name. Broken links count, so that they are reported as unreadable.

    Pipes and devices do not count, since reading them could block.
    """
    suffix = os.path.splitext(entry.name)[1].lower()
    if suffix not in IMAGE_SUFFIXES or entry.name == "index.npy":
        skipped.endings[os.path.splitext(entry.name)[1] or "no ending"] += 1
        return False
    try:
        is_regular = entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:
        is_regular = True
    if not is_regular:
        skipped.reasons[os.path.relpath(entry.path, root)] = "not a regular file"
    return is_regular


def _sample(files: FileImages, path: str, root: Path) -> Sample:
    stem, suffix = os.path.splitext(os.path.relpath(path, root))
    try:
        about = os.stat(path)
    except OSError:  # a broken link is skipped when it is read
        return Sample(stem, suffix.lower(), files, path, NO_LABEL)
    return Sample(stem, suffix.lower(), files, path, NO_LABEL, about.st_size, about.st_mtime_ns)


def _notes(skipped: _Skipped, empty: list[str]) -> list[str]:
    notes = []
    if skipped.endings:
        notes.append(f"not read as images: {_counted(skipped.endings)}")
    if skipped.system:
        notes.append(f"skipped hidden or system files: {_counted(skipped.system)}")
    if empty:
        notes.append(f"folders without images, which are no classes: {brief_names(empty)}")
    if skipped.reasons:
        name, reason = next(iter(skipped.reasons.items()))
        notes.append(f"skipped {len(skipped.reasons)} entries (first: {printable(name)}: {reason})")
    return notes


def _skipped(skipped: _Skipped, empty: list[str]) -> dict[str, str]:
    """Skipped entries with reasons, as the index records them."""
    endings = {f"*{ending}": f"{count} files that are not read as images" for ending, count in skipped.endings.items()}
    system = dict.fromkeys(skipped.system, "a hidden or system file or folder")
    return endings | system | {f"{name}/": "a folder without images" for name in empty} | skipped.reasons


def _counted(counts: Counter) -> str:
    counted = [f"{count} x {printable(name, 40)}{_extra(name)}" for name, count in counts.most_common(8)]
    return ", ".join(counted) + (", ..." if len(counts) > 8 else "")


def _extra(ending: str) -> str:
    """Hint on how to read files with this ending, or an empty string."""
    extra = EXTRAS.get(ending.lower())
    return f" (to read them: {extra})" if extra and ending.lower() not in IMAGE_SUFFIXES else ""


def _contents(source: Path, skipped: _Skipped) -> str:
    """Describe the contents of a folder without images, for the message."""
    if sets := sets_below(source):
        names = brief_names([str(path.relative_to(source)) for path in sets])
        return f"(shards lie in its folders {names}; name one of them, such as {printable(sets[0])})"
    if skipped.endings:
        return f"(it holds {_counted(skipped.endings)}; images end in {', '.join(sorted(IMAGE_SUFFIXES))})"
    return f"(looked for {', '.join(sorted(IMAGE_SUFFIXES))} in it and its folders)"
