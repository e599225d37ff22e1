"""Real images that samples are held against, and which of the model's classes they are of."""

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
    "Remove it; or make a reference file, which may leave such images out: task=reference reference.files.skip_broken=true, then "
    "evaluate.reference=FILE.npz."
)


class RealImages:
    """The images of class folders, or of an npz file of image files, all in memory once they were asked for.

    Args:
        path: Of them.
        image_size: Of the ADM center crop.
        class_to_idx: See `label_classes`.
    """

    def __init__(
        self, path: str | Path, *, image_size: int, class_to_idx: str | None = None
    ) -> None:
        self.path, self.image_size, self.class_to_idx = path, image_size, class_to_idx

    @cached_property
    def images(self) -> LabelledImages:
        images = open_images(
            self.path, image_size=self.image_size, class_to_idx=self.class_to_idx, remedy=REMEDY
        )
        for sentence in images.said:
            rank_zero_warn(f"data.images: {sentence}")
        return images

    @cached_property
    def images_and_labels(self) -> tuple[Tensor, Tensor]:
        """uint8 (N, 3, size, size) and (N,)."""
        read, counts = [], Counter()
        for i in range(len(self.images)):
            pixels, notes, _ = self.images.read(i)
            read.append(pixels)
            counts.update(note for note in Note if note in notes)
        for sentence in describe_notes(counts):
            rank_zero_warn(f"data.images: {sentence}")
        return torch.stack(read), torch.from_numpy(self.images.labels)

    def classes(self, *, num_classes: int) -> list[int]:
        """Labels that the images have, ascending.

        Raises:
            ValueError: when they are not among the `num_classes` classes of a model, or may be others of them.
        """
        found = disagreement(
            self.images.classes,
            self.images.indices,
            kind=self.images.labelled_by,
            num_classes=num_classes,
        )
        if found is not None:
            raise ValueError(
                f"data.images={self.path}: {found[0]}. Give data.class_to_idx=FILE, a JSON file {{name: label}}, "
                "data.class_to_idx=imagenet where the names are wnids, or data.class_to_idx=order if 0, 1, ... is right."
            )
        return sorted(set(self.images.labels.tolist()))
