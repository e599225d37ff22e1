"""ImageNet latents in the layout of the published extraction: one ``N.npy`` for each image and one for its label."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tinyfusion_pl.data.base import GenerationDataModule


class NumpyFolders(Dataset):
    """``features/N.npy`` (1, C, H, W) float with ``labels/N.npy`` (1,) integer, for N = 0, 1, ..."""

    def __init__(self, features: Path, labels: Path) -> None:
        self.features, self.labels = features, labels
        self.names = sorted((path.name for path in features.glob("*.npy")), key=lambda name: int(name.removesuffix(".npy")))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        name = self.names[index]
        try:
            x, y = np.load(self.features / name), np.load(self.labels / name)
        except (OSError, ValueError) as error:
            raise ValueError(f"Latent {self.features / name} or its label in {self.labels} cannot be read: {error}.") from error
        return torch.from_numpy(x).float().squeeze(0), torch.from_numpy(y).long().reshape(())  # (C, H, W), ()


class ImageNetLatents(GenerationDataModule):
    """Training batches of VAE latents of ImageNet at 256x256, already scaled by 0.18215.

    Args:
        root: Folder with ``imagenet256_features/`` and ``imagenet256_labels/``.
        batch_size, seed, num_workers: See `GenerationDataModule`.

    Raises:
        ValueError: when the folders are missing or their files do not pair up; says how to get them.
    """

    latent_shape = (4, 32, 32)
    num_classes = 1000

    def __init__(self, root: str | Path | None, *, batch_size: int = 256, seed: int = 0, num_workers: int = 8) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        wanted = ("It needs ImageNet's VAE latents: a folder with imagenet256_features/N.npy (1, 4, 32, 32) and imagenet256_labels/N.npy, "
                  "as the published extraction script writes them (train/ of ImageNet-1k through the SD VAE, scaled by 0.18215).")
        if root is None:
            raise ValueError(f"data.root is not set. {wanted} Give data.root=FOLDER.")
        self.features, self.labels = Path(root) / "imagenet256_features", Path(root) / "imagenet256_labels"
        if missing := [str(folder) for folder in (self.features, self.labels) if not folder.is_dir()]:
            raise ValueError(f"There is no {' and no '.join(missing)}. {wanted}")
        features, labels = ({path.name for path in folder.glob("*.npy")} for folder in (self.features, self.labels))
        if not features or features != labels:
            raise ValueError(f"{self.features} holds {len(features)} latents, {self.labels} {len(labels)} labels; "
                             "each N.npy must be in both.")

    def train_set(self) -> Dataset:
        return NumpyFolders(self.features, self.labels)

    def decode(self, latents: Tensor) -> Tensor:
        raise ValueError("Turning ImageNet latents into pictures needs the VAE, which this version does not bring: with these data "
                         "task=learn_mask and task=recover work, task=evaluate and task=pipeline do not.")

    def reference_pictures(self) -> tuple[Tensor, Tensor]:
        return self.decode(torch.empty(0, *self.latent_shape)), torch.empty(0)
