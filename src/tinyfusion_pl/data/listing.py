"""The listing of image folders: files, their order, and what is ignored and why."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tinyfusion_pl.data.reading import SUFFIXES
from tinyfusion_pl.printable import printable

CLUTTER = (
    "__macosx",
    "thumbs.db",
    "desktop.ini",
    "@eadir",
    "$recycle.bin",
    "system volume information",
    "lost+found",
    "__pycache__",
)
SPLITS = ("train", "training", "val", "valid", "validation", "test")
NUM_NAMED = 3


@dataclass
class Ignored:
    """What a listing ignored.

    Args:
        names: Reason -> names.
        endings: Suffix of other files -> number of files.
    """

    names: dict[str, list[str]] = field(default_factory=dict)
    endings: Counter[str] = field(default_factory=Counter)

    def add(self, reason: str, name: str) -> None:
        """Add a name."""
        self.names.setdefault(reason, []).append(name)

    def sentences(self) -> list[str]:
        """Return what was ignored, with counts and the first names."""
        said = [f"{len(names)} {reason} ({named(names)})" for reason, names in self.names.items()]
        if self.endings:
            kinds = ", ".join(
                f"{num} {ending or 'without a suffix'}"
                for ending, num in self.endings.most_common(4)
            )
            said.append(f"{sum(self.endings.values())} files without an image suffix ({kinds})")
        return said


def named(names: list[str]) -> str:
    """Return the first names, and how many more there are."""
    more = f", and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
    return ", ".join(printable(name) for name in names[:NUM_NAMED]) + more


def is_clutter(name: str) -> bool:
    """Return whether a name belongs to the system or a tool: hidden, ``__MACOSX``, ..."""
    return name.startswith(".") or name.lower() in CLUTTER


def is_image(name: str) -> bool:
    """Return whether a file name has an image suffix."""
    return name.lower().endswith(SUFFIXES)


def find_images(root: str | os.PathLike) -> tuple[list[str], Ignored]:
    """Return the names below `root` of all image files, and what was ignored.

    Linked folders are followed, and numbers in names sort by value (2 before 10).
    """
    ignored = Ignored()
    return sorted(_walk(root, "", ignored), key=by_number), ignored


def find_class_folders(root: str | os.PathLike) -> tuple[dict[str, list[str]], Ignored]:
    """Return class folder -> names below `root` of its images, and what was ignored.

    The order is that of torchvision's ``ImageFolder``, except that numeric names sort by value.
    """
    ignored, folders = Ignored(), []
    for name, is_folder in _entries(root, "", ignored):
        if is_folder:
            folders.append(name)
        elif is_image(name):
            ignored.add("images outside of class folders", name)
        else:
            ignored.endings[Path(name).suffix.lower()] += 1
    ancestors = (_identity(root),)
    return {
        name: sorted(_walk(root, name, ignored, ancestors), key=os.path.split)
        for name in class_order(folders)
    }, ignored


def class_order(names: list[str]) -> list[str]:
    """Sort class folders in label order: by value if all are numbers, else as text."""
    return sorted(names, key=by_number if all(is_number(name) for name in names) else None)


def is_number(name: str) -> bool:
    """Return whether a name consists of ASCII digits."""
    return name.isascii() and name.isdecimal()


def by_number(name: str) -> tuple:
    """Sort key that orders numbers within names by value."""
    parts = (part for part in re.split(r"([0-9]+)", name) if part)
    return tuple((0, int(part), part) if is_number(part) else (1, 0, part) for part in parts)


def _walk(
    root: str | os.PathLike, below: str, ignored: Ignored, ancestors: tuple = ()
) -> Iterator[str]:
    identity = _identity(Path(root, below))
    if identity in ancestors:
        ignored.add("links to a folder that contains them", below)
        return
    for name, is_folder in _entries(root, below, ignored):
        if is_folder:
            yield from _walk(root, name, ignored, (*ancestors, identity))
        elif is_image(name):
            yield name
        else:
            ignored.endings[Path(name).suffix.lower()] += 1


def _entries(root: str | os.PathLike, below: str, ignored: Ignored) -> Iterator[tuple[str, bool]]:
    """Yield the names below `root` of the entries of `below`, and whether each is a folder."""
    try:
        entries = sorted(os.scandir(Path(root, below)), key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(f"Cannot list folder {Path(root, below)}: {error.strerror}.") from error
    for entry in entries:
        name = f"{below}{os.sep}{entry.name}" if below else entry.name
        if is_clutter(entry.name):
            ignored.add("hidden files or folders", name)
        else:
            yield name, _is_folder(entry)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(path: str | os.PathLike) -> tuple[int, int]:
    state = Path(path).stat()
    return state.st_dev, state.st_ino
