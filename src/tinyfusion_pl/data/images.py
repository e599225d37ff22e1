"""Labelled images before they become latents: class folders as ImageNet has them, or JPEG files packed into an npz file."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tinyfusion_pl.artifacts import ArtifactError
from tinyfusion_pl.data.pictures import center_crop


class LabelledImages(Dataset):
    """Image i as uint8 (3, size, size), ADM centre crop, and its label.

    ``classes`` names the labels (wnids), ``class_names`` says what they are where that is known.
    """

    classes: list[str]
    class_names: list[str] | None
    labels: np.ndarray

    def __init__(self, *, image_size: int) -> None:
        self.image_size = image_size

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Where image `index` is, for people."""
        raise NotImplementedError

    def file(self, index: int) -> Any:
        """What PIL opens."""
        raise NotImplementedError

    def listing(self) -> str:
        """16 hexadecimal digits over what there is, in its order: names or sizes of the image files, and labels."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(self.file(index)) as image:
                image = image.convert("RGB")
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
            raise ValueError(f"{self.name(index)} is no readable image ({error}). Replace or remove it, and begin again.") from error
        picture = np.array(center_crop(image, self.image_size))  # (size, size, 3)
        return torch.from_numpy(picture).permute(2, 0, 1), int(self.labels[index])


class ClassFolders(LabelledImages):
    """``root/CLASS/*.JPEG``; labels are numbers of the sorted class folders, as torchvision's ``ImageFolder`` gives them."""

    def __init__(self, root: str | os.PathLike, *, image_size: int) -> None:
        from torchvision.datasets import ImageFolder

        super().__init__(image_size=image_size)
        try:
            self.root, found = root, ImageFolder(root)
        except FileNotFoundError as error:
            raise ValueError(f"{root} is no folder of class folders with images ({error}). Give ImageNet's train/ (train/n01440764/*.JPEG, "
                             "...) or an npz file.") from error
        self.paths = np.array([path for path, _ in found.samples])  # one array: a list would be copied into every worker process
        self.labels = np.array([label for _, label in found.samples], dtype=np.int64)
        self.classes, self.class_names = found.classes, None

    def name(self, index: int) -> str:
        return str(self.paths[index])

    file = name

    def listing(self) -> str:
        names = "\n".join(os.path.relpath(path, self.root) for path in self.paths)
        return _digest(names.encode(), self.labels.tobytes())


class PackedImages(LabelledImages):
    """An npz file with ``blob``, the bytes of all image files, ``offsets`` (N + 1) into it, ``labels`` (N,), and optionally ``wnids`` and
    ``names`` of the classes."""

    def __init__(self, path: str | os.PathLike, *, image_size: int) -> None:
        super().__init__(image_size=image_size)
        self.path = Path(path)
        if not self.path.is_file():
            raise ArtifactError(f"There is no file {path}. Check the path.")
        try:
            with np.load(self.path, allow_pickle=False) as arrays:
                held = {name: arrays[name] for name in arrays.files if name in ("blob", "offsets", "labels", "wnids", "names")}
        except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
            raise ArtifactError(f"{path} is not a whole npz file of plain arrays ({error}). Make or download it again.") from error
        if lacking := [name for name in ("blob", "offsets", "labels") if name not in held]:
            raise ArtifactError(f"{path} has no {', '.join(lacking)}; an npz file of images holds blob (bytes of the image files), offsets "
                                "(N + 1) into it and labels (N,).")
        self.blob, self.offsets, self.labels = held["blob"], held["offsets"], held["labels"].astype(np.int64)
        if len(self.offsets) != len(self.labels) + 1 or int(self.offsets[-1]) != self.blob.nbytes:
            raise ArtifactError(f"{path} is inconsistent: {len(self.offsets)} offsets up to {int(self.offsets[-1])} for {len(self.labels)} "
                                f"labels and {self.blob.nbytes} bytes.")
        num_classes = int(self.labels.max()) + 1
        self.classes = [str(name) for name in held["wnids"]] if "wnids" in held else [str(number) for number in range(num_classes)]
        self.class_names = [str(name) for name in held["names"]] if "names" in held else None
        if num_classes > len(self.classes) or self.labels.min() < 0:
            raise ArtifactError(f"{path} has labels {self.labels.min()} to {self.labels.max()} and names {len(self.classes)} classes.")

    def name(self, index: int) -> str:
        return f"image {index} of {self.path}"

    def file(self, index: int) -> Any:
        return io.BytesIO(self.blob[self.offsets[index] : self.offsets[index + 1]].tobytes())

    def listing(self) -> str:
        return _digest(self.offsets.tobytes(), self.labels.tobytes())


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def open_images(path: str | os.PathLike, *, image_size: int) -> LabelledImages:
    """The images of a folder of class folders, or of an npz file.

    Raises:
        ValueError, ArtifactError: when they cannot be read; says what was expected.
    """
    return (PackedImages if Path(path).suffix == ".npz" else ClassFolders)(path, image_size=image_size)
