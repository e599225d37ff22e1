"""Images to latents in ``trainer.test``, on as many devices as the Trainer has."""

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
    """Each process encodes the images of its shards, as they are and mirrored, and hands the moments to its writer.

    Args:
        vae: Makes moments of uint8 images.
        images: By number: number, image (3, H, W) uint8, label (-1: there is none), notes, why there is none, checksum; see `Slots`.
        writer: Makes a process's from ``rank=`` and ``world_size=``.
        batch_size: Images read and written at once.
        num_workers: Processes that read and decode image files.
    """

    what_it_does = "Extracting"  # for the progress bar

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
        self.model = vae.model  # a module, so that it is moved to the device
        self.vae, self.images, self.make_writer = vae, images, writer
        self.batch_size, self.num_workers = batch_size, num_workers
        self.num_done = 0
        self.notes = torch.zeros(
            len(Note), dtype=torch.long
        )  # images of this process that each note is of
        self.broken: list[str] = []  # which images of this process were left out, and why

    def setup(self, stage: str) -> None:
        self.writer = self.make_writer(
            rank=self.trainer.global_rank, world_size=self.trainer.world_size
        )
        self.trainer.strategy.barrier("every process has seen what is there")

    def test_dataloader(self) -> DataLoader:
        self.writer.start()
        return DataLoader(
            self.images,
            batch_sampler=self.writer.batches(self.batch_size),
            num_workers=self.num_workers,
        )

    def test_step(
        self, batch: tuple[Tensor, Tensor, Tensor, Tensor, list[str], Tensor], batch_idx: int
    ) -> None:
        numbers, pixels, labels, notes, reasons, digests = batch
        both = torch.stack([pixels, pixels.flip(-1)], dim=1)  # (n, 2, 3, H, W)
        moments = self.vae.encode(both.flatten(0, 1)).unflatten(0, (-1, 2))  # (n, 2, 2C, h, w)
        self.writer.add(numbers, moments, labels, digests=digests)
        self.num_done += len(numbers)
        self.notes += torch.stack([(notes & note).count_nonzero() for note in Note]).cpu()
        self.broken += [reason for reason in reasons if reason]
