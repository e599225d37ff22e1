"""Training samples drawn from shards of latents."""

from __future__ import annotations

import json

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from tinyfusion_pl.artifacts import ArtifactError
from tinyfusion_pl.checksums import state_sha256
from tinyfusion_pl.data.numpy_folders import (
    MAX_SCALED,
    MAX_SCALED_STD,
    MIN_SCALED_STD,
    NUM_CHECKED,
)
from tinyfusion_pl.data.random_latents import RANDOM
from tinyfusion_pl.data.shards import (
    LatentShards,
    get_generator,
    normal,
    posterior_sample,
    shard_path,
)

MIN_STD, MAX_STD = 0.01, 30.0  # the latents of no VAE are outside, not even of a random one


class DrawnLatents(Dataset):
    """``(draw, index)`` -> training sample (x (C, h, w) float32 scaled, y ()).

    Mirroring (of half the draws) and the sample of mean and log-variance are functions of (seed,
    draw), so a resumed run sees the same values as an uninterrupted one.

    Args:
        shards: The latents.
        labels: (N,); default: those of the shards.
        seed: Seed of mirroring and of the samples.
    """

    takes_draws = True

    def __init__(
        self, shards: LatentShards, *, labels: np.ndarray | None = None, seed: int = 0
    ) -> None:
        self.shards, self.seed = shards, seed
        self.labels = shards.labels if labels is None else labels
        self.scaling_factor = np.float32(shards.info.vae["scaling_factor"])

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, draw_and_index: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return self.__getitems__([draw_and_index])[0]

    def __getitems__(self, draws_and_indices: list[tuple[int, int]]) -> list[tuple[Tensor, Tensor]]:
        """Return a batch, for a DataLoader; takes a third of the time of single samples."""
        info = self.shards.info
        draws, indices = zip(*draws_and_indices)
        generators = [get_generator(self.seed, draw) for draw in draws]
        mirrored = [int(generator.random() < 0.5) for generator in generators]
        latents = self.shards.read_many(indices, mirrored)  # (N, C', h, w)
        if info.content == "moments":
            latents = posterior_sample(
                latents,
                np.stack([normal(generator, info.latent_shape) for generator in generators]),
            )
        x = torch.from_numpy(latents * self.scaling_factor)  # (N, C, h, w)
        return list(zip(x, torch.from_numpy(self.labels[list(indices)])))

    def check_values(self) -> None:
        """Check a few samples, and warn about an unusual scale.

        Raises:
            ArtifactError: if a sample is constant, or the values are out of the range of latents.
        """
        indices = np.unique(np.linspace(0, len(self) - 1, NUM_CHECKED).astype(int)).tolist()
        samples = self.__getitems__(list(enumerate(indices)))
        x = torch.stack([x for x, _ in samples])  # (n, C, h, w)
        self.shards.close()
        if float(x.abs().max()) > MAX_SCALED:
            raise ArtifactError(
                f"{self.shards.root}: the {len(indices)} samples checked hold values up to "
                f"{x.abs().max():.3g}; scaled latents stay below 10. Extract them again."
            )
        std, made = float(x.std()), self.shards.info.vae
        if (
            x.numel() == 1
            or MIN_SCALED_STD <= std <= MAX_SCALED_STD
            or str(made["source"]) == RANDOM
        ):
            return
        what = (
            f"{self.shards.root}: the latents, scaled by {self.scaling_factor:g}, have a standard "
            f"deviation of {std:.3g} instead of about 1"
        )
        if not MIN_STD <= std <= MAX_STD:
            raise ArtifactError(
                f"{what}: they are damaged, or were scaled before they were written. Extract them "
                "again."
            )
        rank_zero_warn(
            f"{what}: they were scaled before they were written, the factor belongs to another "
            f"VAE, or the VAE ({made['source']}) is unusual or untrained."
        )

    def sha256(self) -> str:
        """Return a checksum of description, labels, sizes of all shards, and a few samples."""
        indices = np.unique(np.linspace(0, len(self) - 1, NUM_CHECKED).astype(int)).tolist()
        stored = self.shards.read_many(indices, [0] * len(indices))
        self.shards.close()
        sizes = [
            shard_path(self.shards.root, shard).stat().st_size
            for shard in range(self.shards.info.num_shards)
        ]
        info = {
            key: value
            for key, value in self.shards.info.as_dict().items()
            if key not in ("images", "labelled_by")
        }
        return state_sha256(
            {"labels": torch.from_numpy(self.labels), "stored": torch.from_numpy(stored)},
            preface=json.dumps([info, sizes], sort_keys=True),
        )
