"""Finished batches of an evaluation on disk, until it is whole: what an interrupted one goes on from."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from tinyfusion_pl.artifacts import load_tensors, save_tensors
from tinyfusion_pl.metrics import Features


class KeptBatches:
    """One safetensors file a batch: numbers, labels and features of its samples, and the pictures where they are asked for later.

    Features of 50,000 samples take about 1 GB; the folder is deleted when the evaluation is whole.

    Args:
        folder: Where they are kept.
        pictures: Whether to keep the pictures too.
    """

    def __init__(self, folder: Path, *, pictures: bool = False) -> None:
        self.folder, self.pictures = folder, pictures

    def write(self, indices: Tensor, labels: Tensor, features: Features, pictures: Tensor) -> None:
        """Keep a batch: numbers (N,), labels (N,), features, uint8 pictures (N, C, H, W)."""
        tensors = {"indices": indices, "labels": labels, **{name: x for name, x in features._asdict().items() if x is not None}}
        if self.pictures:
            tensors["pictures"] = pictures
        save_tensors(self.folder / f"{int(indices[0]):08d}.safetensors", tensors)

    def indices(self) -> Tensor:
        """Numbers of the samples that are kept, ascending."""
        numbers = [tensors["indices"] for tensors in self._files(only=("indices",))]
        return torch.cat([torch.empty(0, dtype=torch.long), *numbers]).sort().values

    def batches(self, *, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Tensor, Tensor, Features]]:
        """The share of process `rank` of `world_size`: numbers, labels, features."""
        for tensors in self._files(rank, world_size):
            yield tensors["indices"], tensors["labels"], Features(*(tensors.get(name) for name in Features._fields))

    def numbered_pictures(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Numbers and pictures of all batches."""
        for tensors in self._files(only=("indices", "pictures")):
            yield tensors["indices"], tensors["pictures"]

    @rank_zero_only
    def delete(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):  # of another model's batches, too
            self.folder.parent.rmdir()

    def _files(self, rank: int = 0, world_size: int = 1, *, only: Sequence[str] | None = None) -> Iterator[dict[str, Tensor]]:
        for path in sorted(self.folder.glob("[0-9]*.safetensors"))[rank::world_size]:
            yield load_tensors(path, only=only)
