"""The folders of the published extraction: scaled latents, one ``N.npy`` an image, and as many labels."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from tinyfusion_pl.arrays import read_npy
from tinyfusion_pl.artifacts import ArtifactError
from tinyfusion_pl.checksums import state_sha256

NUM_CHECKED = 32  # files before training; each is checked when it is read
NUM_CLASSES = 1000
# Scaled latents have a standard deviation of about 1; those of Stable Diffusion's VAE before scaling 5.5, scaled twice 0.18 (MAR's 0.23).
MIN_SCALED_STD, MAX_SCALED_STD = 0.3, 3.0
FEW_ODD = 0.1  # the share of latents that may be of another scale on their own
MAX_SCALED = 1000.0  # of a single value; those of images stay below 10


class NumpyFolders(Dataset):
    """``features/N.npy`` (1, C, H, W) float with ``labels/N.npy`` (1,) integer, for N = 0, 1, ...

    Raises:
        ArtifactError, ValueError: when a file cannot be one of these, or the latents are not scaled once.
    """

    def __init__(self, features: Path, labels: Path) -> None:
        self.features, self.labels = features, labels
        names = [path.name for path in features.glob("*.npy") if not path.name.startswith(".")]
        if wrong := [name for name in names if not _is_number(name)]:
            raise ArtifactError(
                f"{features / wrong[0]} is no N.npy with a number N, as the published extraction writes them. Remove it."
            )
        self.names = sorted(names, key=lambda name: int(name.removesuffix(".npy")))
        self.num_classes: int | None = None  # that the labels must be below, once it is known
        self.shape: tuple[int, ...] | None = None  # that all must have, likewise
        label_names = {path.name for path in labels.glob("*.npy") if not path.name.startswith(".")}
        if not len(self) or set(self.names) != label_names:
            raise ValueError(
                f"{features} holds {len(self)} latents, {labels} {len(label_names)} labels; each N.npy must be in both."
            )
        self.shape = tuple(self[0][0].shape)
        if len(self.shape) != 3:
            raise ArtifactError(
                f"{features / self.names[0]} is no latent (1, C, h, w) or (C, h, w)."
            )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        name = self.names[index]
        try:
            x = read_npy(self.features / name)
            if x.dtype.kind != "f":
                raise ValueError(f"it is {x.dtype}; latents are floats")
            with np.errstate(over="ignore"):  # infinities are found below
                latents = torch.from_numpy(x.astype(np.float32)).squeeze(0)  # (C, H, W)
        except (ArtifactError, ValueError, TypeError) as error:
            raise self._unreadable(name, error) from error
        label = self.label(index)
        if self.shape is not None and latents.shape != self.shape:
            raise ArtifactError(
                f"{self.features / name} is {tuple(latents.shape)}, the others are {tuple(self.shape)}."
            )
        if not torch.isfinite(latents).all():
            raise ArtifactError(
                f"{self.features / name} holds values that are not finite: the file is damaged. Extract it again."
            )
        if latents.numel() and (highest := float(latents.abs().max())) > MAX_SCALED:
            raise ArtifactError(
                f"{self.features / name} holds values up to {highest:.3g}, where scaled latents stay below 10: the file is "
                "damaged. Extract it again."
            )
        if latents.numel() > 1 and float(latents.max()) == float(latents.min()):
            raise ArtifactError(
                f"{self.features / name} holds the number {float(latents.max()):g} alone: it was never written, or is "
                "damaged. Extract it again."
            )
        return latents, torch.tensor(label)

    def label(self, index: int) -> int:
        """The label of sample `index`."""
        path = self.labels / self.names[index]
        try:
            y = read_npy(path)
            if y.dtype.kind not in "iu" or y.size != 1:
                raise ValueError(f"it is {y.dtype} {y.shape}; labels are one whole number each")
            label = int(y.reshape(()))
        except (ArtifactError, ValueError) as error:
            raise self._unreadable(self.names[index], error) from error
        if self.num_classes is not None and not 0 <= label < self.num_classes:
            raise ArtifactError(
                f"{path} has the label {label}, but the model knows the classes 0 to {self.num_classes - 1}. Give a model "
                "with more classes, or put the right label there."
            )
        if not 0 <= label < 2**31 and self.num_classes is None:
            raise ArtifactError(f"{path} has the label {label}; labels are 0, 1, ...")
        return label

    def _unreadable(self, name: str, error: Exception) -> ArtifactError:
        return ArtifactError(
            f"Latent {self.features / name} or its label in {self.labels} cannot be read: {str(error).rstrip('.')}. Put "
            "it back, and the same command goes on."
        )

    def checked(self) -> list[int]:
        """Samples that are looked at before training."""
        return np.unique(np.linspace(0, len(self) - 1, NUM_CHECKED).astype(int)).tolist()

    def sha256(self) -> str:
        """A checksum of all names and of a few samples."""
        samples = [self[i] for i in self.checked()]
        tensors = {
            "x": torch.stack([x for x, _ in samples]),
            "y": torch.stack([y for _, y in samples]),
        }
        return state_sha256(tensors, preface=" ".join(self.names))

    def check_scale(self, scaling_factor: float) -> None:
        """Find out, by a few files, whether the latents were multiplied by `scaling_factor` once.

        Raises:
            ValueError: when they were not, or twice.
        """
        latents = torch.stack([self[i][0] for i in self.checked()])  # (n, C, H, W)
        std = float(latents.std())
        what = f"The latents in {self.features} have a standard deviation of {std:.3g}, where scaled ones have about 1"
        if std > MAX_SCALED_STD:
            raise ValueError(
                f"{what}: they look as if they had not been multiplied by the VAE's scaling factor ({scaling_factor})."
            )
        if not std >= MIN_SCALED_STD and latents.numel() > 1:
            raise ValueError(
                f"{what}: they look as if they had been multiplied by the VAE's scaling factor ({scaling_factor}) twice. "
                "Extract them again, or divide them by it."
            )
        odd = [
            (self.names[i], each)
            for i, each in zip(self.checked(), latents.flatten(1).std(1).tolist())
            if not MIN_SCALED_STD <= each <= MAX_SCALED_STD
        ]
        if len(odd) > FEW_ODD * len(latents) and latents[0].numel() > 1:
            rank_zero_warn(
                f"{len(odd)} of the {len(latents)} latents looked at in {self.features} have another scale than the others "
                f"({odd[0][0]}: standard deviation {odd[0][1]:.3g}, all together {std:.3g}): they are of unusual images, or "
                f"were scaled by the VAE's factor ({scaling_factor}) another number of times."
            )

    @cached_property
    def classes(self) -> list[int]:
        """Labels that there are, ascending. Label files are read in a random order, until all classes of the model (1000 where it is not
        known) were seen.
        """
        seen: set[int] = set()
        for index in np.random.default_rng(0).permutation(len(self)).tolist():
            seen.add(self.label(index))
            if len(seen) >= (self.num_classes or NUM_CLASSES):
                break
        return sorted(seen)


def _is_number(name: str) -> bool:
    stem = name.removesuffix(".npy")
    return stem.isascii() and stem.isdecimal()
