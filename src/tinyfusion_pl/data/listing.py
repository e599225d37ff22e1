"""The one listing of image folders: what is found, in which order, and what is left out and why."""

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
    """What a listing left out: names by reason, and how often each ending of other files occurs."""

    names: dict[str, list[str]] = field(default_factory=dict)
    endings: Counter[str] = field(default_factory=Counter)

    def add(self, reason: str, name: str) -> None:
        self.names.setdefault(reason, []).append(name)

    def sentences(self) -> list[str]:
        """What was ignored, counted, with the first names."""
        said = [f"{len(names)} {reason} ({named(names)})" for reason, names in self.names.items()]
        if self.endings:
            kinds = ", ".join(
                f"{num} {ending or 'without an ending'}"
                for ending, num in self.endings.most_common(4)
            )
            said.append(
                f"{sum(self.endings.values())} files that are no images by their ending ({kinds})"
            )
        return said


def named(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = f", and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
    return ", ".join(printable(name) for name in names[:NUM_NAMED]) + more


def is_clutter(name: str) -> bool:
    """Whether a file or folder is of the operating system or a tool: hidden, ``__MACOSX``, ``Thumbs.db``, ..."""
    return name.startswith(".") or name.lower() in CLUTTER


def is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def find_images(root: str | os.PathLike) -> tuple[list[str], Ignored]:
    """Names below `root` of all files with an image's ending, and what was ignored; linked folders count, numbers in names count (2
    before 10).
    """
    ignored = Ignored()
    return sorted(_walk(root, "", ignored), key=by_number), ignored


def find_class_folders(root: str | os.PathLike) -> tuple[dict[str, list[str]], Ignored]:
    """Class folder -> names below `root` of its images, in the order of torchvision's ``ImageFolder``, and what was ignored. Folders
    whose names are numbers come by number.
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
    """Names of class folders in the order of their labels: by number where all are numbers, else as text."""
    return sorted(names, key=by_number if all(is_number(name) for name in names) else None)


def is_number(name: str) -> bool:
    return name.isascii() and name.isdecimal()


def by_number(name: str) -> tuple:
    """A key that sorts numbers inside names by their value."""
    parts = (part for part in re.split(r"([0-9]+)", name) if part)
    return tuple((0, int(part), part) if is_number(part) else (1, 0, part) for part in parts)


def _walk(
    root: str | os.PathLike, below: str, ignored: Ignored, ancestors: tuple = ()
) -> Iterator[str]:
    identity = _identity(os.path.join(root, below))
    if identity in ancestors:
        ignored.add("links to a folder that they are in", below)
        return
    for name, is_folder in _entries(root, below, ignored):
        if is_folder:
            yield from _walk(root, name, ignored, (*ancestors, identity))
        elif is_image(name):
            yield name
        else:
            ignored.endings[Path(name).suffix.lower()] += 1


def _entries(root: str | os.PathLike, below: str, ignored: Ignored) -> Iterator[tuple[str, bool]]:
    """Names below `root` of what is in folder `below`, and whether each is a folder."""
    try:
        entries = sorted(os.scandir(os.path.join(root, below)), key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(
            f"Cannot list the folder {os.path.join(root, below)}: {error.strerror}."
        ) from error
    for entry in entries:
        name = os.path.join(below, entry.name)
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
    state = os.stat(path)
    return state.st_dev, state.st_ino
