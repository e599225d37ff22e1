"""Finished batches of an evaluation on disk, from which an interrupted evaluation resumes."""

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
    """One safetensors file per batch: indices, labels and features of its samples.

    Features of 50,000 samples take about 1 GB; the folder is deleted when the evaluation finishes.
    Each file contains its checksum and origin: `check` deletes damaged files and those of another
    origin before they are used.

    Args:
        folder: Folder of the files.
        images: Whether to save the images as well.
        made_from: Origin of the content, name -> checksum.
    """

    def __init__(
        self, folder: Path, *, images: bool = False, made_from: Origin | None = None
    ) -> None:
        self.folder, self.images, self.made_from = folder, images, made_from or {}

    def write(self, indices: Tensor, labels: Tensor, features: Features, images: Tensor) -> None:
        """Save a batch: indices (N,), labels (N,), features, uint8 images (N, C, H, W)."""
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
        """Delete and report the batches that cannot be used; other processes wait for it."""
        reasons: dict[str, int] = {}
        for path in self._paths():
            if reason := self._reason(path):
                path.unlink()
                reasons[reason] = reasons.get(reason, 0) + 1
        for reason, num in reasons.items():
            say(
                f"evaluate: discarding {num} finished {'batches' if num > 1 else 'batch'} in "
                f"{self.folder}, to be sampled again: {reason}"
            )

    def _reason(self, path: Path) -> str:
        try:
            tensors, made_from = load_sealed_tensors(path)
        except Damaged as error:
            return str(error)
        if found := differences(made_from, self.made_from):
            return f"another origin ({found})"
        return (
            "the images, which are now required, were not saved"
            if self.images and "images" not in tensors
            else ""
        )

    def indices(self) -> Tensor:
        """Indices of the saved samples, ascending."""
        numbers = [tensors["indices"] for tensors in self._files(only=("indices",))]
        return torch.cat([torch.empty(0, dtype=torch.long), *numbers]).sort().values

    def batches(
        self, *, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[Tensor, Tensor, Features]]:
        """Indices, labels and features of the batches of process `rank` of `world_size`."""
        for tensors in self._files(rank, world_size):
            features = Features(tensors["features"], tensors.get("logits"), tensors.get("spatial"))
            yield tensors["indices"], tensors["labels"], features

    def numbered_images(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Indices and images of all batches."""
        for tensors in self._files(only=("indices", "images")):
            yield tensors["indices"], tensors["images"]

    @rank_zero_only
    def delete(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):  # may contain the batches of another model
            self.folder.parent.rmdir()

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]*.safetensors"))

    def _files(
        self, rank: int = 0, world_size: int = 1, *, only: Sequence[str] | None = None
    ) -> Iterator[dict[str, Tensor]]:
        for path in self._paths()[rank::world_size]:
            yield load_tensors(path, only=only)
