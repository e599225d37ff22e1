"""Pictures in a folder or in an npz file: what is measured, or what samples are held against."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
MODES = {1: "L", 3: "RGB"}


class PictureFolder(Dataset):
    """The pictures below a folder, by name, as uint8 (C, H, W); numbers in names count (2 before 10).

    Args:
        root: Folder; subfolders count.
        image_size: Centre crop to this size as the ADM data loader does; None: as they are, all of one size.
        num_channels: 3, or 1 for grey.
        skip_broken: Leave out what cannot be read, and count it in `num_skipped`, instead of an error.

    Raises:
        ValueError: when the folder has no pictures; on reading, for a broken picture (its path is named) or one of another size.
    """

    def __init__(self, root: str | os.PathLike, *, image_size: int | None = None, num_channels: int = 3,
                 skip_broken: bool = False) -> None:
        if num_channels not in MODES:
            raise ValueError(f"num_channels is {num_channels}; give 3, or 1 for grey pictures.")
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
                image = image.convert(MODES[self.num_channels])
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
            if self.skip_broken:
                return None
            raise ValueError(f"{path} is no readable picture ({error}). Remove it, or skip such ones with skip_broken=true.") from error
        if self.image_size is not None:
            image = center_crop(image, self.image_size)
        return torch.from_numpy(np.array(image)).view(*image.size[::-1], -1).permute(2, 0, 1)  # (C, H, W)


class PictureArray(Dataset):
    """``arr_0`` (N, H, W, C), uint8, as pictures (C, H, W)."""

    def __init__(self, pictures: Tensor) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Tensor:
        return self.pictures[index]


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


def center_crop(image, size: int):
    """The middle square of a PIL image at `size`: halved by averaging while twice as large, then bicubic, as the ADM data loader does."""
    from PIL import Image

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), resample=Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _by_number(path: Path) -> tuple:
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", str(path)) if part)
