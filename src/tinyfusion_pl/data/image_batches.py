"""Images in a folder, an npz file or a dataset: what is measured, or what samples are held against."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tinyfusion_pl.data.images import LabelledImages
from tinyfusion_pl.data.listing import find_images
from tinyfusion_pl.data.reading import (
    SUFFIXES,
    BrokenImage,
    ImageReader,
    Note,
    center_crop,
    describe_notes,
)
from tinyfusion_pl.printable import printable

__all__ = ["ImageArray", "ImageBatches", "ImageDataset", "UnlabelledImageFolder", "center_crop"]
REMEDY = "Remove it, or skip such ones with skip_broken=true."
NUM_REASONS = 5


class UnlabelledImageFolder(Dataset):
    """The images below a folder, by name, as uint8 (C, H, W); numbers in names count (2 before 10).

    Args:
        root: Folder; subfolders count.
        skip_broken: Leave out what cannot be read, and count it, instead of an error.
        reading: ``image_size``, ``num_channels``, ``max_pixels`` of `ImageReader`.

    ``said`` are sentences on what was ignored.

    Raises:
        ValueError: when the folder has no images; on reading, for an image that is broken or can be read in two ways (its path is named).
    """

    def __init__(
        self, root: str | os.PathLike, *, skip_broken: bool = False, **reading: Any
    ) -> None:
        self.root, self.reader, self.skip_broken = Path(root), ImageReader(**reading), skip_broken
        if not self.root.is_dir():
            raise ValueError(
                f"There is no folder {root}. Give a folder of images ({', '.join(SUFFIXES)}) or an npz file."
            )
        names, ignored = find_images(root)
        self.said = [f"Ignored in {root}: {sentence}." for sentence in ignored.sentences()]
        if not names:
            beside = f"; it holds {'; '.join(ignored.sentences())}" if ignored.sentences() else ""
            raise ValueError(f"{root} holds no images ({', '.join(SUFFIXES)}){beside}.")
        self.paths = [self.root / name for name in names]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor | None:
        """uint8 (C, H, W), or None for a broken image that is skipped."""
        return self.read(index)[0]

    def read(self, index: int) -> tuple[Tensor | None, Note, str]:
        """As `LabelledImages.read`."""
        path = self.paths[index]
        try:
            return *self.reader.read(path), ""
        except BrokenImage as error:
            if self.skip_broken:
                return None, Note(0), f"{printable(str(path))}: {error}"
            raise ValueError(
                f"{printable(str(path))} is no readable image ({error}). {REMEDY}"
            ) from error


class UnlabelledPackedImages(Dataset):
    """Image files in an npz file, see `PackedImages`, without their labels."""

    def __init__(self, images: LabelledImages) -> None:
        self.read, self.said, self.num = images.read, images.said, len(images)

    def __len__(self) -> int:
        return self.num


class ImageArray(Dataset):
    """``arr_0`` (N, H, W, C), uint8, as images (C, H, W)."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


class ImageDataset(Dataset):
    """Any map-style dataset as images, uint8 (C, H, W): its samples, or their first parts, are PIL images or such tensors.

    Args:
        dataset: For instance one of torchvision's, without a transform.
        skip_broken: Leave out PIL images that cannot be read in one way.
        reading: Of PIL images: ``image_size``, ``num_channels``, ``max_pixels`` of `ImageReader`.

    Raises:
        ValueError: on reading, for a sample that is neither (its number is named).
    """

    def __init__(self, dataset: Any, *, skip_broken: bool = False, **reading: Any) -> None:
        if not len(dataset):
            raise ValueError(f"The dataset {type(dataset).__name__} is empty.")
        self.dataset, self.reader, self.skip_broken = dataset, ImageReader(**reading), skip_broken

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Tensor | None:
        return self.read(index)[0]

    def read(self, index: int) -> tuple[Tensor | None, Note, str]:
        """As `LabelledImages.read`."""
        from PIL import Image

        image = self.dataset[index]
        image = image[0] if isinstance(image, (tuple, list)) else image
        if isinstance(image, Image.Image):
            try:
                return *self.reader.convert(image), ""
            except BrokenImage as error:
                where = f"sample {index} of {type(self.dataset).__name__}"
                if self.skip_broken:
                    return None, Note(0), f"{where}: {error}"
                raise ValueError(f"{where} is no readable image ({error}). {REMEDY}") from error
        if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.ndim != 3:
            found = (
                f"{image.dtype} {tuple(image.shape)}"
                if isinstance(image, Tensor)
                else type(image).__name__
            )
            raise ValueError(
                f"Sample {index} of {type(self.dataset).__name__} is {found}; images are PIL images or uint8 tensors "
                "(C, H, W). Leave out the dataset's own transform."
            )
        return image, Note(0), ""


class ImageBatches:
    """Batches (numbers (n,), images (n, C, H, W)) of the images that process `rank` of `world_size` has to look at.

    ``num_skipped`` counts broken images that were left out so far, ``reasons`` are why, of the first few.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int = 64,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.dataset, self.batch_size, self.num_workers = dataset, batch_size, num_workers
        self.numbers = range(rank, len(dataset), world_size)
        self.num_skipped, self.reasons, self.notes = 0, [], Counter()

    def __len__(self) -> int:
        return -(-len(self.numbers) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            _Numbered(self.dataset),
            batch_size=self.batch_size,
            sampler=self.numbers,
            num_workers=self.num_workers,
            collate_fn=list,
        )
        num_found = 0
        for batch in loader:
            found = [(number, image) for number, image, _, _ in batch if image is not None]
            self.num_skipped += len(batch) - len(found)
            self.notes.update(note for _, _, notes, _ in batch for note in Note if note in notes)
            self.reasons += [reason for *_, reason in batch if reason][
                : NUM_REASONS - len(self.reasons)
            ]
            if len(sizes := {tuple(image.shape[1:]) for _, image in found}) > 1:
                raise ValueError(
                    f"The images have different sizes, {sorted(sizes)[:4]}. Give image_size to crop them to one."
                )
            num_found += len(found)
            if found:
                yield (
                    torch.tensor([number for number, _ in found]),
                    torch.stack([image for _, image in found]),
                )
        if not num_found and len(self.numbers):
            raise ValueError(
                f"None of the {len(self.numbers)} images could be read ({'; '.join(self.reasons)})."
            )

    def sentences(self) -> list[str]:
        """What is worth saying of the images: what was ignored when they were listed, and what was seen when they were read."""
        skipped = f"{self.num_skipped} broken images were skipped: {'; '.join(self.reasons)}"
        more = "; ..." if self.num_skipped > len(self.reasons) else ""
        return [
            *getattr(self.dataset, "said", []),
            *describe_notes(self.notes),
            *([skipped + more + "."] if self.num_skipped else []),
        ]


class _Numbered(Dataset):
    """Sample by number: number, pixels or None, notes, and why there are none."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, Note, str]:
        if hasattr(self.dataset, "read"):
            return index, *self.dataset.read(index)
        return index, self.dataset[index], Note(0), ""
