"""Real images to compare samples with, and their classes."""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from tinyfusion_pl.data.classes import disagreement
from tinyfusion_pl.data.images import LabelledImages, open_images
from tinyfusion_pl.data.reading import Note, describe_notes

REMEDY = (
    "Remove it; or make a reference file without broken images (task=reference "
    "reference.files.skip_broken=true) and give evaluate.reference=FILE.npz."
)


class RealImages:
    """The images of class folders, or of an npz file of image files, loaded into memory on use.

    Args:
        path: The folder or npz file.
        image_size: Side of the ADM center crop, in pixels.
        class_to_idx: How class folders become labels; see `label_classes`.
    """

    def __init__(
        self, path: str | Path, *, image_size: int, class_to_idx: str | None = None
    ) -> None:
        self.path, self.image_size, self.class_to_idx = path, image_size, class_to_idx

    @cached_property
    def images(self) -> LabelledImages:
        """The image files, opened once; warns about ignored files."""
        images = open_images(
            self.path, image_size=self.image_size, class_to_idx=self.class_to_idx, remedy=REMEDY
        )
        for sentence in images.said:
            rank_zero_warn(f"data.images: {sentence}")
        return images

    @cached_property
    def images_and_labels(self) -> tuple[Tensor, Tensor]:
        """Images, uint8 (N, 3, size, size), and labels (N,)."""
        read: list[Tensor] = []
        counts: Counter[Note] = Counter()
        for i in range(len(self.images)):
            pixels, notes, _ = self.images.read(i)
            assert pixels is not None  # a broken image is an error without skip_broken
            read.append(pixels)
            counts.update(note for note in Note if note in notes)
        for sentence in describe_notes(counts):
            rank_zero_warn(f"data.images: {sentence}")
        return torch.stack(read), torch.from_numpy(self.images.labels)

    def classes(self, *, num_classes: int) -> list[int]:
        """Return the labels of the images, ascending.

        Raises:
            ValueError: if they are not, or may not be, the `num_classes` classes of a model.
        """
        found = disagreement(
            self.images.classes,
            self.images.indices,
            kind=self.images.labelled_by,
            num_classes=num_classes,
        )
        if found is not None:
            raise ValueError(
                f"data.images={self.path}: {found[0]}. Give data.class_to_idx=FILE, a JSON file "
                "{name: label}; data.class_to_idx=imagenet if the names are wnids; or "
                "data.class_to_idx=order if 0, 1, ... is right."
            )
        return sorted(set(self.images.labels.tolist()))
