"""Finished batches of an evaluation on disk, until it is whole: what an interrupted one resumes from."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from tinyfusion_pl.artifacts import load_tensors
from tinyfusion_pl.checksums import (
    Damaged,
    Origin,
    differences,
    load_sealed_tensors,
    save_sealed_tensors,
)
from tinyfusion_pl.metrics import Features
from tinyfusion_pl.tasks.folder import say


class KeptBatches:
    """One safetensors file a batch: numbers, labels and features of its samples, and the images where they are asked for later.

    Features of 50,000 samples take about 1 GB; the folder is deleted when the evaluation is whole. Each file carries its checksum and
    what it was made from: `check`, before they are used, deletes damaged ones and those of another origin.

    Args:
        folder: Where they are kept.
        images: Whether to keep the images too.
        made_from: What decides their content, name -> checksum.
    """

    def __init__(
        self, folder: Path, *, images: bool = False, made_from: Origin | None = None
    ) -> None:
        self.folder, self.images, self.made_from = folder, images, made_from or {}

    def write(self, indices: Tensor, labels: Tensor, features: Features, images: Tensor) -> None:
        """Keep a batch: numbers (N,), labels (N,), features, uint8 images (N, C, H, W)."""
        tensors = {
            "indices": indices,
            "labels": labels,
            **{name: x for name, x in features._asdict().items() if x is not None},
        }
        if self.images:
            tensors["images"] = images
        save_sealed_tensors(
            self.folder / f"{int(indices[0]):08d}.safetensors", tensors, made_from=self.made_from
        )

    @rank_zero_only
    def check(self) -> None:
        """Delete the batches that cannot be used, and say which and why; other processes wait for it."""
        reasons: dict[str, int] = {}
        for path in self._paths():
            if reason := self._reason(path):
                path.unlink()
                reasons[reason] = reasons.get(reason, 0) + 1
        for reason, num in reasons.items():
            say(
                f"evaluate: {num} finished {'batches' if num > 1 else 'batch'} in {self.folder} cannot be used and will be made again: "
                f"{reason}"
            )

    def _reason(self, path: Path) -> str:
        try:
            tensors, made_from = load_sealed_tensors(path)
        except Damaged as error:
            return str(error)
        if found := differences(made_from, self.made_from):
            return f"made from something else ({found})"
        return (
            "without the images, which are asked for now"
            if self.images and "images" not in tensors
            else ""
        )

    def indices(self) -> Tensor:
        """Numbers of the samples that are kept, ascending."""
        numbers = [tensors["indices"] for tensors in self._files(only=("indices",))]
        return torch.cat([torch.empty(0, dtype=torch.long), *numbers]).sort().values

    def batches(
        self, *, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[Tensor, Tensor, Features]]:
        """The share of process `rank` of `world_size`: numbers, labels, features."""
        for tensors in self._files(rank, world_size):
            yield (
                tensors["indices"],
                tensors["labels"],
                Features(*(tensors.get(name) for name in Features._fields)),
            )

    def numbered_images(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Numbers and images of all batches."""
        for tensors in self._files(only=("indices", "images")):
            yield tensors["indices"], tensors["images"]

    @rank_zero_only
    def delete(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):  # of another model's batches, too
            self.folder.parent.rmdir()

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]*.safetensors"))

    def _files(
        self, rank: int = 0, world_size: int = 1, *, only: Sequence[str] | None = None
    ) -> Iterator[dict[str, Tensor]]:
        for path in self._paths()[rank::world_size]:
            yield load_tensors(path, only=only)
