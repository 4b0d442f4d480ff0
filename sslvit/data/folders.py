"""A folder of images -> samples: class folders or one flat folder; what is passed over is counted and said."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sslvit.data.decode import EXTRAS, IMAGE_SUFFIXES
from sslvit.data.labels import NO_LABEL, brief_names, sorted_names
from sslvit.data.sources import FileImages, ImageSource, Sample
from sslvit.files import printable

SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"}
# what systems and archives leave beside people's files
SYSTEM_NAMES = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found",
                "Thumbs.db", "desktop.ini"}  # fmt: skip


@dataclass
class _Passed:
    """What a walk passed over.

    Args:
        endings: files that are not read as images, by ending.
        system: hidden and system files and folders, by name.
        reasons: other things, by their path.
    """

    endings: Counter = field(default_factory=Counter)
    system: Counter = field(default_factory=Counter)
    reasons: dict[str, str] = field(default_factory=dict)


def folder_source(source: Path) -> ImageSource:
    """The images of a folder in the order of their names, and the classes if there are folders of them.

    Links to folders are followed. Hidden and system files are passed over, folders without images are no classes.

    Raises:
        ValueError: no images there, images beside folders of images, or train/ and val/ instead of classes.
    """
    if not source.is_dir():
        raise ValueError(f"{printable(source)}: no such folder.")
    passed, files = _Passed(), FileImages()
    here: list[Sample] = []
    classes: dict[str, list[Sample]] = {}
    empty = []
    for entry in _entries(source, passed):
        if _is_folder(entry):
            found = [_sample(files, path, source) for path in _images_below(entry.path, source, passed, ())]
            if found:
                classes[entry.name] = found
            else:
                empty.append(entry.name)
        elif _is_image(entry, source, passed):
            here.append(_sample(files, entry.path, source))
    if here and classes:
        raise ValueError(
            f"{printable(source)}: holds images ({printable(here[0].key + here[0].suffix)}, ...) beside folders of "
            f"images ({brief_names(classes, 3)}). Either one folder per class, or all images side by side."
        )
    if not here and not classes:
        raise ValueError(f"{printable(source)}: no images there {_what_else(source, passed)}.")
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
    notes = _notes(passed, empty)
    if splits:
        notes.append(f"{brief_names(splits)} {'is' if len(splits) == 1 else 'are'} taken for classes like the others")
    samples = here + [sample for name in names for sample in classes[name]]
    return ImageSource(samples, names or None, _skipped(passed, empty), notes)


def _entries(folder: str | Path, passed: _Passed) -> list[os.DirEntry]:
    """What a folder holds by name, without hidden and system files."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(f"{printable(folder)}: not readable ({error.strerror}). Check its permissions.") from error
    kept = []
    for entry in entries:
        if entry.name.startswith(".") or entry.name in SYSTEM_NAMES:
            passed.system[entry.name] += 1
        else:
            kept.append(entry)
    return kept


def _images_below(folder: str, root: Path, passed: _Passed, above: tuple[str, ...]) -> Iterator[str]:
    """All images at any depth, in the order of their names."""
    real = os.path.realpath(folder)
    if real in above:
        passed.reasons[os.path.relpath(folder, root)] = "a link to a folder above it"
        return
    for entry in _entries(folder, passed):
        if _is_folder(entry):
            yield from _images_below(entry.path, root, passed, (*above, real))
        elif _is_image(entry, root, passed):
            yield entry.path


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a circle of links
        return False


def _is_image(entry: os.DirEntry, root: Path, passed: _Passed) -> bool:
    """By its name. Links to nowhere are images that will be named as unreadable; pipes and devices would hang."""
    suffix = os.path.splitext(entry.name)[1].lower()
    if suffix not in IMAGE_SUFFIXES or entry.name == "index.npy":
        passed.endings[os.path.splitext(entry.name)[1] or "no ending"] += 1
        return False
    try:
        is_regular = entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:
        is_regular = True
    if not is_regular:
        passed.reasons[os.path.relpath(entry.path, root)] = "not a regular file"
    return is_regular


def _sample(files: FileImages, path: str, root: Path) -> Sample:
    stem, suffix = os.path.splitext(os.path.relpath(path, root))
    try:
        about = os.stat(path)
    except OSError:  # a link to nowhere is left out when it is read
        return Sample(stem, suffix.lower(), files, path, NO_LABEL)
    return Sample(stem, suffix.lower(), files, path, NO_LABEL, about.st_size, about.st_mtime_ns)


def _notes(passed: _Passed, empty: list[str]) -> list[str]:
    notes = []
    if passed.endings:
        notes.append(f"not read as images: {_counted(passed.endings)}")
    if passed.system:
        notes.append(f"passed over as hidden or system files: {_counted(passed.system)}")
    if empty:
        notes.append(f"folders without images, which are no classes: {brief_names(empty)}")
    if passed.reasons:
        name, reason = next(iter(passed.reasons.items()))
        notes.append(f"left out {len(passed.reasons)} (the first: {printable(name)}: {reason})")
    return notes


def _skipped(passed: _Passed, empty: list[str]) -> dict[str, str]:
    """The same for the index."""
    endings = {f"*{ending}": f"{count} files that are not read as images" for ending, count in passed.endings.items()}
    system = dict.fromkeys(passed.system, "a hidden or system file or folder")
    return endings | system | {f"{name}/": "a folder without images" for name in empty} | passed.reasons


def _counted(counts: Counter) -> str:
    shown = [f"{count} x {printable(name, 40)}{_extra(name)}" for name, count in counts.most_common(8)]
    return ", ".join(shown) + (", ..." if len(counts) > 8 else "")


def _extra(ending: str) -> str:
    """How to have these files read, where there is a way."""
    extra = EXTRAS.get(ending.lower())
    return f" (to read them: {extra})" if extra and ending.lower() not in IMAGE_SUFFIXES else ""


def _what_else(source: Path, passed: _Passed) -> str:
    """What a folder without images holds, for the message."""
    sets = [path.name for path in sorted(source.iterdir()) if (path / "index.json").exists() or any(path.glob("*.tar"))]
    if sets:
        return f"itself; shards lie in its folders {brief_names(sets)}. Name one of them, such as {source / sets[0]}"
    if passed.endings:
        return f"(it holds {_counted(passed.endings)}; images end in {', '.join(sorted(IMAGE_SUFFIXES))})"
    return f"(looked for {', '.join(sorted(IMAGE_SUFFIXES))} in it and its folders)"
