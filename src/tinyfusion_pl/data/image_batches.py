"""Batches of unlabeled images from a folder, an npz file or a dataset."""

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
    BrokenImageError,
    ImageReader,
    Note,
    center_crop,
    describe_notes,
)
from tinyfusion_pl.printable import printable

__all__ = ["ImageArray", "ImageBatches", "ImageDataset", "UnlabelledImageFolder", "center_crop"]
REMEDY = "Remove it, or skip broken images with skip_broken=true."
NUM_REASONS = 5


class UnlabelledImageFolder(Dataset):
    """The images below a folder, uint8 (C, H, W), sorted by name with numbers by value.

    ``said`` are messages about ignored files.

    Args:
        root: Folder, searched with its subfolders.
        skip_broken: Skip and count images that cannot be read, rather than raise.
        reading: ``image_size``, ``num_channels``, ``max_pixels`` of `ImageReader`.

    Raises:
        ValueError: if the folder has no images; on reading, for a broken or ambiguous image.
    """

    def __init__(
        self, root: str | os.PathLike, *, skip_broken: bool = False, **reading: Any
    ) -> None:
        self.root, self.reader, self.skip_broken = Path(root), ImageReader(**reading), skip_broken
        if not self.root.is_dir():
            raise ValueError(
                f"Folder {root} not found. Give a folder of images ({', '.join(SUFFIXES)}) or an "
                "npz file."
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
        """Return uint8 (C, H, W), or None for a skipped image."""
        return self.read(index)[0]

    def read(self, index: int) -> tuple[Tensor | None, Note, str]:
        """Read an image; see `LabelledImages.read`."""
        path = self.paths[index]
        try:
            return *self.reader.read(path), ""
        except BrokenImageError as error:
            if self.skip_broken:
                return None, Note(0), f"{printable(str(path))}: {error}"
            raise ValueError(
                f"{printable(str(path))} is not a readable image ({error}). {REMEDY}"
            ) from error


class UnlabelledPackedImages(Dataset):
    """The image files in an npz file (see `PackedImages`), without labels."""

    def __init__(self, images: LabelledImages) -> None:
        self.read, self.said, self.num = images.read, images.said, len(images)

    def __len__(self) -> int:
        return self.num


class ImageArray(Dataset):
    """Images, uint8 (C, H, W), from a tensor (N, C, H, W)."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


class ImageDataset(Dataset):
    """The images, uint8 (C, H, W), of a map-style dataset.

    Args:
        dataset: Its samples, or their first elements, are PIL images or uint8 tensors (C, H, W);
            for example a dataset of torchvision without a transform.
        skip_broken: Skip PIL images that are broken or ambiguous.
        reading: ``image_size``, ``num_channels``, ``max_pixels`` of `ImageReader`, for PIL images.

    Raises:
        ValueError: on reading, for a sample of another type.
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
        """Read an image; see `LabelledImages.read`."""
        from PIL import Image

        image = self.dataset[index]
        image = image[0] if isinstance(image, (tuple, list)) else image
        if isinstance(image, Image.Image):
            try:
                return *self.reader.convert(image), ""
            except BrokenImageError as error:
                where = f"sample {index} of {type(self.dataset).__name__}"
                if self.skip_broken:
                    return None, Note(0), f"{where}: {error}"
                raise ValueError(f"{where} is not a readable image ({error}). {REMEDY}") from error
        if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.ndim != 3:
            found = (
                f"{image.dtype} {tuple(image.shape)}"
                if isinstance(image, Tensor)
                else type(image).__name__
            )
            raise ValueError(
                f"Sample {index} of {type(self.dataset).__name__} is {found}; expected PIL images "
                "or uint8 tensors (C, H, W). Leave out the transform of the dataset."
            )
        return image, Note(0), ""


class ImageBatches:
    """Batches (numbers (n,), images (n, C, H, W)) of the share of process `rank` of `world_size`.

    ``num_skipped`` counts the broken images skipped so far; ``reasons`` explains the first few.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        batch_size: int = 64,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.dataset, self.batch_size, self.num_workers = dataset, batch_size, num_workers
        self.numbers = range(rank, len(dataset), world_size)
        self.num_skipped = 0
        self.reasons: list[str] = []
        self.notes: Counter[Note] = Counter()

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
            reasons = [reason for *_, reason in batch if reason]
            self.reasons += reasons[: NUM_REASONS - len(self.reasons)]
            if len(sizes := {tuple(image.shape[1:]) for _, image in found}) > 1:
                raise ValueError(
                    f"The images have different sizes ({sorted(sizes)[:4]}). Give image_size to "
                    "crop them to one size."
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
        """Return messages about files ignored by the listing and notes from reading."""
        skipped = f"{self.num_skipped} broken images were skipped: {'; '.join(self.reasons)}"
        more = "; ..." if self.num_skipped > len(self.reasons) else ""
        return [
            *getattr(self.dataset, "said", []),
            *describe_notes(self.notes),
            *([skipped + more + "."] if self.num_skipped else []),
        ]


class _Numbered(Dataset):
    """Samples as (number, pixels or None, notes, reason for None)."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, Note, str]:
        if hasattr(self.dataset, "read"):
            return index, *self.dataset.read(index)
        return index, self.dataset[index], Note(0), ""
