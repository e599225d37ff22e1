"""The folders of the published extraction: scaled latents and labels, one file per image."""

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

NUM_CHECKED = 32  # files checked before training; the others when they are read
NUM_CLASSES = 1000
# Scaled latents have a standard deviation of about 1. Those of Stable Diffusion's VAE have 5.5
# before scaling, and 0.18 if scaled twice (MAR's 0.23).
MIN_SCALED_STD, MAX_SCALED_STD = 0.3, 3.0
FEW_ODD = 0.1  # share of latents that may have another scale
MAX_SCALED = 1000.0  # limit of a value; latents of images stay below 10


class NumpyFolders(Dataset):
    """``features/N.npy`` (1, C, H, W) float with ``labels/N.npy`` (1,) integer, for N = 0, 1, ...

    Raises:
        ArtifactError: for a file with another name or content.
        ValueError: if there are no latents, or not the same number of labels.
    """

    def __init__(self, features: Path, labels: Path) -> None:
        self.features, self.labels = features, labels
        names = [path.name for path in features.glob("*.npy") if not path.name.startswith(".")]
        if wrong := [name for name in names if not _is_number(name)]:
            raise ArtifactError(
                f"{features / wrong[0]} is not named N.npy with a number N, as the published "
                "extraction names its files. Remove it."
            )
        self.names = sorted(names, key=lambda name: int(name.removesuffix(".npy")))
        self.num_classes: int | None = None  # upper bound of labels, once known
        self.shape: tuple[int, ...] | None = None  # shape of all latents, once known
        label_names = {path.name for path in labels.glob("*.npy") if not path.name.startswith(".")}
        if not len(self) or set(self.names) != label_names:
            raise ValueError(
                f"{features} holds {len(self)} latents and {labels} {len(label_names)} labels; "
                "each N.npy must be in both."
            )
        self.shape = tuple(self[0][0].shape)
        if len(self.shape) != 3:
            raise ArtifactError(
                f"{features / self.names[0]} is not a latent (1, C, h, w) or (C, h, w)."
            )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        name = self.names[index]
        try:
            x = read_npy(self.features / name)
            if x.dtype.kind != "f":
                raise ValueError(f"it is {x.dtype}; latents are floats")
            with np.errstate(over="ignore"):  # infinities are detected below
                latents = torch.from_numpy(x.astype(np.float32)).squeeze(0)  # (C, H, W)
        except (ArtifactError, ValueError, TypeError) as error:
            raise self._unreadable(name, error) from error
        label = self.label(index)
        if self.shape is not None and latents.shape != self.shape:
            raise ArtifactError(
                f"{self.features / name} has shape {tuple(latents.shape)}, but the others have "
                f"{tuple(self.shape)}."
            )
        if not torch.isfinite(latents).all():
            raise ArtifactError(
                f"{self.features / name} holds values that are not finite: the file is damaged. "
                "Extract it again."
            )
        if latents.numel() and (highest := float(latents.abs().max())) > MAX_SCALED:
            raise ArtifactError(
                f"{self.features / name} holds values up to {highest:.3g}; scaled latents stay "
                "below 10. The file is damaged: extract it again."
            )
        if latents.numel() > 1 and float(latents.max()) == float(latents.min()):
            raise ArtifactError(
                f"{self.features / name} holds only the value {float(latents.max()):g}: it was "
                "never written, or is damaged. Extract it again."
            )
        return latents, torch.tensor(label)

    def label(self, index: int) -> int:
        """Return the label of sample `index`."""
        path = self.labels / self.names[index]
        try:
            y = read_npy(path)
            if y.dtype.kind not in "iu" or y.size != 1:
                raise ValueError(f"it is {y.dtype} {y.shape}; expected one integer")
            label = int(y.reshape(()))
        except (ArtifactError, ValueError) as error:
            raise self._unreadable(self.names[index], error) from error
        if self.num_classes is not None and not 0 <= label < self.num_classes:
            raise ArtifactError(
                f"{path} has the label {label}, but the model has classes 0 to "
                f"{self.num_classes - 1}. Give a model with more classes, or correct the label."
            )
        if not 0 <= label < 2**31 and self.num_classes is None:
            raise ArtifactError(f"{path} has the label {label}; labels are 0, 1, ...")
        return label

    def _unreadable(self, name: str, error: Exception) -> ArtifactError:
        return ArtifactError(
            f"Latent {self.features / name} or its label in {self.labels} cannot be read: "
            f"{str(error).rstrip('.')}. Restore it and rerun the same command to resume."
        )

    def checked(self) -> list[int]:
        """Return the indices of the samples that are checked before training."""
        return np.unique(np.linspace(0, len(self) - 1, NUM_CHECKED).astype(int)).tolist()

    def sha256(self) -> str:
        """Return a checksum of all names and a few samples."""
        samples = [self[i] for i in self.checked()]
        tensors = {
            "x": torch.stack([x for x, _ in samples]),
            "y": torch.stack([y for _, y in samples]),
        }
        return state_sha256(tensors, preface=" ".join(self.names))

    def check_scale(self, scaling_factor: float) -> None:
        """Check, on a few files, that the latents were multiplied by `scaling_factor` once.

        Raises:
            ValueError: if they were not scaled, or scaled twice.
        """
        latents = torch.stack([self[i][0] for i in self.checked()])  # (n, C, H, W)
        std = float(latents.std())
        what = (
            f"The latents in {self.features} have a standard deviation of {std:.3g} instead of "
            "about 1"
        )
        if std > MAX_SCALED_STD:
            raise ValueError(
                f"{what}: they seem not to be multiplied by the scaling factor of the VAE "
                f"({scaling_factor}). Extract them again, or multiply them by it."
            )
        if not std >= MIN_SCALED_STD and latents.numel() > 1:
            raise ValueError(
                f"{what}: they seem to be multiplied by the scaling factor of the VAE "
                f"({scaling_factor}) twice. Extract them again, or divide them by it."
            )
        odd = [
            (self.names[i], each)
            for i, each in zip(self.checked(), latents.flatten(1).std(1).tolist())
            if not MIN_SCALED_STD <= each <= MAX_SCALED_STD
        ]
        if len(odd) > FEW_ODD * len(latents) and latents[0].numel() > 1:
            rank_zero_warn(
                f"{len(odd)} of the {len(latents)} latents checked in {self.features} have another "
                f"scale than the others ({odd[0][0]}: standard deviation {odd[0][1]:.3g}, overall "
                f"{std:.3g}): their images are unusual, or they were not scaled once by the factor "
                f"of the VAE ({scaling_factor})."
            )

    @cached_property
    def classes(self) -> list[int]:
        """Labels in the folder, ascending.

        Reads label files in random order until all classes of the model (1000 if unknown) occurred.
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
