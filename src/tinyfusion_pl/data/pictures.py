"""Pictures in a folder, an npz file or a dataset: what is measured, or what samples are held against."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
MODES = {1: "L", 3: "RGB"}
EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")  # PIL would clip what others hold


class PictureFolder(Dataset):
    """The pictures below a folder, by name, as uint8 (C, H, W); numbers in names count (2 before 10).

    Args:
        root: Folder; subfolders count.
        image_size: Centre crop to this size as the ADM data loader does; None: as they are, all of one size.
        num_channels: 3, or 1 for grey.
        skip_broken: Leave out what cannot be read, and count it in `num_skipped`, instead of an error.

    Raises:
        ValueError: when the folder has no pictures; on reading, for a picture that is broken or of more than 8 bits (its path is named),
            and for one of another size.
    """

    def __init__(self, root: str | os.PathLike, *, image_size: int | None = None, num_channels: int = 3,
                 skip_broken: bool = False) -> None:
        _check_channels(num_channels)
        self.root, self.image_size, self.num_channels, self.skip_broken = Path(root), image_size, num_channels, skip_broken
        if not self.root.is_dir():
            raise ValueError(f"There is no folder {root}. Give a folder of pictures ({', '.join(SUFFIXES)}) or an npz file.")
        self.paths = sorted((path for path in self.root.rglob("*") if path.suffix.lower() in SUFFIXES), key=_by_number)
        if not self.paths:
            raise ValueError(f"{root} holds no pictures ({', '.join(SUFFIXES)}).")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor | None:
        """uint8 (C, H, W), or None for a broken picture that is skipped."""
        from PIL import Image, UnidentifiedImageError

        path = self.paths[index]
        try:
            with Image.open(path) as image:
                image.load()
                picture = as_tensor(image, num_channels=self.num_channels, image_size=self.image_size)
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
            if self.skip_broken:
                return None
            raise ValueError(f"{path} is no readable picture ({error}). Remove it, or skip such ones with skip_broken=true.") from error
        return picture


class PictureArray(Dataset):
    """``arr_0`` (N, H, W, C), uint8, as pictures (C, H, W)."""

    def __init__(self, pictures: Tensor) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Tensor:
        return self.pictures[index]


class PictureDataset(Dataset):
    """Any map-style dataset as pictures, uint8 (C, H, W): its samples, or their first parts, are PIL pictures or such tensors.

    Args:
        dataset: For instance one of torchvision's, without a transform.
        image_size, num_channels: Of PIL pictures, see `PictureFolder`.

    Raises:
        ValueError: on reading, for a sample that is neither (its number is named).
    """

    def __init__(self, dataset: Any, *, image_size: int | None = None, num_channels: int = 3) -> None:
        _check_channels(num_channels)
        if not len(dataset):
            raise ValueError(f"The dataset {type(dataset).__name__} is empty.")
        self.dataset, self.image_size, self.num_channels = dataset, image_size, num_channels

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Tensor:
        from PIL import Image

        picture = self.dataset[index]
        picture = picture[0] if isinstance(picture, (tuple, list)) else picture
        if isinstance(picture, Image.Image):
            return as_tensor(picture, num_channels=self.num_channels, image_size=self.image_size)
        if not isinstance(picture, Tensor) or picture.dtype != torch.uint8 or picture.ndim != 3:
            found = f"{picture.dtype} {tuple(picture.shape)}" if isinstance(picture, Tensor) else type(picture).__name__
            raise ValueError(f"Sample {index} of {type(self.dataset).__name__} is {found}; pictures are PIL images or uint8 tensors "
                             "(C, H, W). Leave out the dataset's own transform.")
        return picture


class PictureBatches:
    """Batches (numbers (n,), pictures (n, C, H, W)) of the pictures that process `rank` of `world_size` has to look at.

    `num_skipped` counts broken pictures that were left out so far.
    """

    def __init__(self, dataset: Dataset, *, batch_size: int = 64, num_workers: int = 0, rank: int = 0, world_size: int = 1) -> None:
        self.dataset, self.batch_size, self.num_workers = dataset, batch_size, num_workers
        self.numbers = range(rank, len(dataset), world_size)
        self.num_skipped = 0

    def __len__(self) -> int:
        return -(-len(self.numbers) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(_Numbered(self.dataset), batch_size=self.batch_size, sampler=self.numbers, num_workers=self.num_workers,
                            collate_fn=list)
        for batch in loader:
            self.num_skipped += sum(picture is None for _, picture in batch)
            found = [(number, picture) for number, picture in batch if picture is not None]
            if len(sizes := {tuple(picture.shape[1:]) for _, picture in found}) > 1:
                raise ValueError(f"The pictures have different sizes, {sorted(sizes)[:4]}. Give image_size to crop them to one.")
            if found:
                yield torch.tensor([number for number, _ in found]), torch.stack([picture for _, picture in found])


class _Numbered(Dataset):
    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[int, Tensor | None]:
        return index, self.dataset[index]


def as_tensor(image, *, num_channels: int, image_size: int | None) -> Tensor:
    """A PIL image as uint8 (C, H, W), cropped and scaled to `image_size` if given; `ValueError` for one of more than 8 bits a channel."""
    if image.mode not in EIGHT_BITS:
        raise ValueError(f"it is of mode {image.mode!r}, more than 8 bits a channel: convert it to values 0..255 first")
    image = image.convert(MODES[num_channels])
    if image_size is not None:
        image = center_crop(image, image_size)
    return torch.from_numpy(np.array(image)).view(*image.size[::-1], -1).permute(2, 0, 1)  # (C, H, W)


def center_crop(image, size: int):
    """The middle square of a PIL image at `size`: halved by averaging while twice as large, then bicubic, as the ADM data loader does."""
    from PIL import Image

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), resample=Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _check_channels(num_channels: int) -> None:
    if num_channels not in MODES:
        raise ValueError(f"num_channels is {num_channels}; give 3, or 1 for grey pictures.")


def _by_number(path: Path) -> tuple:
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", str(path)) if part)
