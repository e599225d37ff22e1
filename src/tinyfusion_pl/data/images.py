"""Labeled images: class folders, as of ImageNet, or image files packed into an npz file."""

from __future__ import annotations

import hashlib
import io
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tinyfusion_pl.arrays import check_regular, read_npz
from tinyfusion_pl.artifacts import ArtifactError
from tinyfusion_pl.data.classes import label_classes, relabel
from tinyfusion_pl.data.listing import SPLITS, find_class_folders, named
from tinyfusion_pl.data.reading import BrokenImageError, ImageReader, Note
from tinyfusion_pl.printable import printable

PACKED = ("blob", "offsets", "labels", "wnids", "classes", "names")
REMEDY = (
    "Replace or remove it and rerun the same command; or skip broken images with skip_broken=true."
)


class LabelledImages(Dataset, ABC):
    """Images, uint8 (3, size, size), with labels.

    ``classes`` are the names of the classes, ``indices`` their labels, ``labelled_by`` the source
    of the labels (see `label_classes`), and ``class_names`` descriptions of the classes, if known.
    ``said`` are messages about ignored files and ambiguous labels.

    Args:
        reader: Reads an image file.
        skip_broken: `read` returns the reason for an image that cannot be read, rather than raise.
        remedy: What to do, for the error about a broken image.
    """

    classes: list[str]
    indices: list[int]
    labelled_by: str
    class_names: list[str] | None
    labels: np.ndarray
    said: list[str]

    def __init__(
        self, *, reader: ImageReader, skip_broken: bool = False, remedy: str = REMEDY
    ) -> None:
        self.reader, self.skip_broken, self.remedy = reader, skip_broken, remedy

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def name(self, index: int) -> str:
        """Return the name of image `index`, unique among these."""

    @abstractmethod
    def place(self, index: int) -> str:
        """Return the location of image `index`, for messages."""

    @abstractmethod
    def file(self, index: int) -> Any:
        """Return what PIL opens."""

    @abstractmethod
    def listing(self) -> str:
        """Return a digest (16 hex digits) of the files (names or sizes) and labels, in order."""

    @abstractmethod
    def stamps(self, num: int) -> list[tuple[int, int]]:
        """Return (bytes, modification stamp) of the first `num` image files; -1 if unknown."""

    @abstractmethod
    def digest(self, index: int) -> int:
        """Return 64 bits of the SHA-256 of image file `index`; 0 if it cannot be read."""

    def read(self, index: int) -> tuple[Tensor | None, Note, str]:
        """Read an image.

        Returns:
            Pixels (3, size, size), notes about them, and an empty string. With `skip_broken`, for a
            broken image: None, no notes, and the reason.

        Raises:
            ValueError: for a broken or ambiguous image, without `skip_broken`.
        """
        try:
            return *self.reader.read(self.file(index)), ""
        except BrokenImageError as error:
            if self.skip_broken:
                return None, Note(0), f"{self.place(index)}: {error}"
            raise ValueError(
                f"{self.place(index)} is not a readable image ({error}). {self.remedy}"
            ) from error

    def __getitem__(self, index: int) -> tuple[Tensor | None, int]:
        return self.read(index)[0], int(self.labels[index])


class ClassFolders(LabelledImages):
    """Images ``root/CLASS/*.JPEG``, labeled by `label_classes`."""

    def __init__(
        self, root: str | os.PathLike, *, class_to_idx: str | None = None, **reading: Any
    ) -> None:
        super().__init__(**reading)
        self.root = Path(root)
        if not self.root.is_dir():
            raise ValueError(
                f"{root} is not a folder of class folders with images. Give ImageNet's train/ "
                "(train/n01440764/*.JPEG, ...) or an npz file."
            )
        found, ignored = find_class_folders(root)
        self.said = [f"Ignored in {root}: {sentence}." for sentence in ignored.sentences()]
        empty = [name for name, names in found.items() if not names]
        if len(empty) == len(found):
            what = (
                f"its {len(found)} class folders hold no images"
                if found
                else "it has no class folders"
            )
            beside = f" (it holds {'; '.join(ignored.sentences())})" if ignored.sentences() else ""
            raise ValueError(
                f"{root} is not a folder of class folders with images: {what}{beside}. Give "
                "ImageNet's train/ (train/n01440764/*.JPEG, ...) or an npz file."
            )
        self.indices, self.labelled_by, said = label_classes(
            list(found), class_to_idx=class_to_idx, where=str(root)
        )
        if empty and self.labelled_by == "order":
            raise ValueError(
                f"{len(empty)} of the {len(found)} class folders of {root} hold no images "
                f"({named(empty)}), and labels are the order of the folders. Remove the empty "
                "folders, or give class_to_idx=order to count them."
            )
        self.said += [f"Class folders of {root} without images: {named(empty)}."] if empty else []
        self.said += said + _split_folders(root, found)
        self.classes, self.class_names = list(found), None
        nums = [len(names) for names in found.values()]
        # An array, because each worker process would copy a list.
        self.paths = np.array([name for names in found.values() for name in names])
        self.labels = np.repeat(np.array(self.indices, dtype=np.int64), nums)

    def name(self, index: int) -> str:
        """Return the name of image `index`, unique among these."""
        return str(self.paths[index])

    def place(self, index: int) -> str:
        """Return the location of image `index`, for messages."""
        return printable(str(self.root / self.name(index)))

    def file(self, index: int) -> Any:
        """Return what PIL opens."""
        return str(self.root / self.name(index))

    def listing(self) -> str:
        """Return a digest of names or sizes, and labels, in order."""
        names = "\n".join(self.paths.tolist())
        return _digest(os.fsencode(names), self.labels.tobytes())

    def stamps(self, num: int) -> list[tuple[int, int]]:
        """Return (bytes, stamp) of the first `num` image files."""
        return [_stamp(self.root / name) for name in self.paths[:num].tolist()]

    def digest(self, index: int) -> int:
        """Return 64 bits of the SHA-256 of image file `index`."""
        try:
            path = self.file(index)
            if check_regular(path).st_size > self.reader.max_bytes:  # refused unread
                return 0
            digest = hashlib.sha256()
            with Path(path).open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
            return _as_integer(digest)
        except (OSError, ValueError, ArtifactError):
            return 0


class PackedImages(LabelledImages):
    """Image files in an npz file.

    Keys: ``blob``, the bytes of all image files; ``offsets`` (N + 1) into it; ``labels`` (N,); and
    optionally ``wnids`` (or ``classes``) and ``names`` of the classes.
    """

    def __init__(
        self, path: str | os.PathLike, *, class_to_idx: str | None = None, **reading: Any
    ) -> None:
        super().__init__(**reading)
        self.path = Path(path)
        held, _ = read_npz(path, only=PACKED)
        if lacking := [name for name in ("blob", "offsets", "labels") if name not in held]:
            raise ArtifactError(
                f"{path} has no {', '.join(lacking)}; an npz file of images holds blob (bytes of "
                "the image files), offsets (N + 1) into it and labels (N,)."
            )
        self.blob, self.offsets = held["blob"], _as_int64(held["offsets"], "offsets", path)
        labels = _as_int64(held["labels"], "labels", path)
        if self.blob.dtype != np.uint8 or self.blob.ndim != 1:
            raise ArtifactError(
                f"'blob' of {path} is {self.blob.dtype} {self.blob.shape}; expected the bytes of "
                "all image files, uint8 of one dimension."
            )
        offsets = self.offsets
        if (
            not len(labels)
            or len(offsets) != len(labels) + 1
            or int(offsets[-1]) != self.blob.nbytes
        ):
            raise ArtifactError(
                f"{path} is inconsistent: {len(offsets)} offsets up to "
                f"{int(offsets[-1]) if len(offsets) else 0} for {len(labels)} labels and "
                f"{self.blob.nbytes} bytes."
            )
        if offsets[0] != 0 or (np.diff(offsets) < 0).any():
            raise ArtifactError(
                f"{path} is inconsistent: its offsets must begin with 0 and never decrease."
            )
        names = held.get("wnids", held.get("classes"))
        for key, given in (("wnids or classes", names), ("names", held.get("names"))):
            if given is not None and (given.ndim != 1 or given.dtype.kind not in "US"):
                raise ArtifactError(
                    f"{key!r} of {path} is {given.dtype} {given.shape}; expected one string per "
                    "class."
                )
        highest, lowest = int(labels.max()), int(labels.min())
        present = (
            range(highest + 1)
            if names is None and highest < len(labels)
            else np.unique(labels).tolist()
        )
        own = list(present) if names is None else list(range(len(names)))
        if lowest < 0 or highest > own[-1]:
            raise ArtifactError(
                f"{path} has labels {lowest} to {highest} and names {len(own)} classes."
            )
        self.classes = [str(number) for number in own] if names is None else _texts(names)
        if len(set(self.classes)) < len(self.classes):
            raise ArtifactError(f"{path} names a class twice in wnids or classes.")
        self.class_names = _texts(held["names"]) if "names" in held else None
        if self.class_names is not None and len(self.class_names) != len(self.classes):
            raise ArtifactError(
                f"{path} has {len(self.class_names)} names for {len(self.classes)} classes."
            )
        self.indices, self.labelled_by, self.said = label_classes(
            self.classes, class_to_idx=class_to_idx, where=str(path), own=own
        )
        self.labels = relabel(labels, own, self.indices, where=str(path))

    def name(self, index: int) -> str:
        """Return the name of image `index`, unique among these."""
        return str(index)

    def place(self, index: int) -> str:
        """Return the location of image `index`, for messages."""
        return f"image {index} of {self.path}"

    def file(self, index: int) -> Any:
        """Return what PIL opens."""
        return io.BytesIO(self._bytes(index))

    def listing(self) -> str:
        """Return a digest of names or sizes, and labels, in order."""
        return _digest(self.offsets.tobytes(), self.labels.tobytes())

    def stamps(self, num: int) -> list[tuple[int, int]]:
        """Return (bytes, stamp) of the first `num` image files."""
        return [
            (int(size), self.digest(i)) for i, size in enumerate(np.diff(self.offsets[: num + 1]))
        ]

    def digest(self, index: int) -> int:
        """Return 64 bits of the SHA-256 of image file `index`."""
        return _as_integer(hashlib.sha256(self._bytes(index)))

    def _bytes(self, index: int) -> bytes:
        return self.blob[self.offsets[index] : self.offsets[index + 1]].tobytes()


def open_images(
    path: str | os.PathLike, *, image_size: int | None, **settings: Any
) -> LabelledImages:
    """Open the images of a folder of class folders, or of an npz file.

    Args:
        path: The folder or npz file.
        image_size: Side of the ADM center crop, in pixels; None: no crop.
        settings: ``class_to_idx`` (see `label_classes`), ``num_channels`` and ``max_pixels`` (see
            `ImageReader`), ``skip_broken`` and ``remedy`` (see `LabelledImages`).

    Raises:
        ValueError: if there are no images or their labels are ambiguous.
        ArtifactError: if the npz file is invalid.
    """
    of_reader = {
        name: settings.pop(name) for name in ("num_channels", "max_pixels") if name in settings
    }
    reader = ImageReader(image_size=image_size, **of_reader)
    return (PackedImages if Path(path).suffix == ".npz" else ClassFolders)(
        path, reader=reader, **settings
    )


def as_batch_item(images: LabelledImages, index: int) -> tuple[Tensor, int, int, str]:
    """Return pixels, label, notes and reason; a broken image is black with label -1."""
    pixels, notes, reason = images.read(index)
    if pixels is None:
        size = images.reader.image_size
        assert size is not None  # images without a size cannot be collated
        return torch.zeros(images.reader.num_channels, size, size, dtype=torch.uint8), -1, 0, reason
    return pixels, int(images.labels[index]), int(notes), ""


def _as_int64(array: np.ndarray, name: str, path: str | os.PathLike) -> np.ndarray:
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise ArtifactError(
            f"{name!r} of {path} is {array.dtype} {array.shape}; expected integers of one "
            "dimension."
        )
    if len(array) and int(array.max()) > np.iinfo(np.int64).max:
        raise ArtifactError(
            f"{name!r} of {path} has values up to {int(array.max())}; the limit is int64."
        )
    return array.astype(np.int64)


def _texts(array: np.ndarray) -> list[str]:
    return [
        each.decode("utf-8", "replace") if isinstance(each, bytes) else str(each)
        for each in array.tolist()
    ]


def _split_folders(root: str | os.PathLike, found: dict[str, list[str]]) -> list[str]:
    """Return a warning if class folders look like the splits of a data set."""
    nested = all(name.count(os.sep) >= 2 for names in found.values() for name in names)
    if found and nested and all(name.lower() in SPLITS for name in found):
        return [
            f"The class folders of {root} are {named(list(found))}, and their images are in "
            f"subfolders: if those are the classes, give {Path(root) / next(iter(found))}."
        ]
    return []


def _stamp(path: Path) -> tuple[int, int]:
    try:
        state = path.stat()
        return state.st_size, state.st_mtime_ns
    except OSError:
        return -1, -1


def _as_integer(digest: Any) -> int:
    return int.from_bytes(digest.digest()[:8], "little", signed=True)


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]
