"""Encodes images as latents in ``trainer.test``, on all devices of the Trainer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tinyfusion_pl.data import VAE
from tinyfusion_pl.data.extraction import ShardWriter
from tinyfusion_pl.data.reading import Note


class Extraction(LightningModule):
    """Each process encodes the images of its shards, plain and mirrored, and writes their moments.

    Args:
        vae: Encodes uint8 images as moments.
        images: Maps a number to (number, image (3, H, W) uint8, label or -1, notes, reason for a
            missing image, checksum). See `Slots`.
        writer: Creates the writer of a process from ``rank=`` and ``world_size=``.
        batch_size: Number of images that a process encodes at once.
        num_workers: Number of processes that read and decode image files.
    """

    what_it_does = "Extracting"  # shown by the progress bar

    def __init__(
        self,
        vae: VAE,
        *,
        images: Dataset,
        writer: Callable[..., ShardWriter],
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.model = vae.model  # registered as a module, so that Lightning moves it to the device
        self.vae, self.images, self.make_writer = vae, images, writer
        self.batch_size, self.num_workers = batch_size, num_workers
        self.num_done = 0
        # How many images of this process got each note.
        self.notes = torch.zeros(len(Note), dtype=torch.long)
        self.broken: list[str] = []  # images that this process left out, with the reason

    def setup(self, stage: str) -> None:
        """Create the writer of this process, which lists the existing shards."""
        self.writer = self.make_writer(
            rank=self.trainer.global_rank, world_size=self.trainer.world_size
        )
        self.trainer.strategy.barrier("every process has listed the existing shards")

    def test_dataloader(self) -> DataLoader:
        """Batches of the images that this process still has to encode."""
        self.writer.start()
        return DataLoader(
            self.images,
            batch_sampler=self.writer.batches(self.batch_size),
            num_workers=self.num_workers,
        )

    def test_step(
        self, batch: tuple[Tensor, Tensor, Tensor, Tensor, list[str], Tensor], batch_idx: int
    ) -> None:
        """Encode a batch and its mirror images, and pass the moments to the writer."""
        numbers, pixels, labels, notes, reasons, digests = batch
        both = torch.stack([pixels, pixels.flip(-1)], dim=1)  # (n, 2, 3, H, W)
        moments = self.vae.encode(both.flatten(0, 1)).unflatten(0, (-1, 2))  # (n, 2, 2C, h, w)
        self.writer.add(numbers, moments, labels, digests=digests)
        self.num_done += len(numbers)
        self.notes += torch.stack([(notes & note).count_nonzero() for note in Note]).cpu()
        self.broken += [reason for reason in reasons if reason]
