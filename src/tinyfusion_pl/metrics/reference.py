"""Reference files: statistics, features or pictures of real images, in the ADM evaluator's npz layout.

Keys: ``arr_0``, uint8 pictures (N, H, W, C); ``mu``, ``sigma``, mean and covariance of features; ``mu_s``, ``sigma_s``, of spatial ones.
A file may hold both, as the published ones do: distances then use the statistics, precision and recall the pictures. Files made here add
``features`` (N, D) and ``network``, the feature network's name and checksum.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tinyfusion_pl.artifacts import ArtifactError, atomic_path
from tinyfusion_pl.metrics.features import describe_values

STATISTICS = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What a reference file holds.

    Args:
        path: The file, for error messages.
        statistics: Of ``"features"`` and ``"spatial"``: mean (D,) and covariance (D, D), float64.
        pictures: uint8 (N, C, H, W) or None.
        features: float32 (N, D) or None.
        network: `GenerationMetrics.fingerprint` of the network that made it; empty where unknown.
        num_pictures: Pictures it was made of, where known.
    """

    path: Path
    statistics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    pictures: Tensor | None = None
    features: Tensor | None = None
    network: str = ""
    num_pictures: int | None = None

    def contents(self) -> str:
        """What it holds, in words."""
        parts = [f"statistics of {of}" for of in self.statistics]
        parts += [name for name in ("pictures", "features") if getattr(self, name) is not None]
        return " and ".join(parts)

    def write(self) -> None:
        """Write it to `path`, whole or not at all."""
        arrays: dict[str, np.ndarray] = {}
        for of, (mu, sigma) in self.statistics.items():
            arrays |= {name: x.cpu().numpy() for name, x in zip(STATISTICS[of], (mu, sigma))}
        if self.pictures is not None:
            arrays["arr_0"] = self.pictures.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        if self.features is not None:
            arrays["features"] = self.features.cpu().numpy()
        arrays |= {"network": np.array(self.network), "num_pictures": np.array(-1 if self.num_pictures is None else self.num_pictures)}
        write_npz(self.path, arrays)


def read_reference(path: str | os.PathLike) -> Reference:
    """A reference file, the published ones included.

    Raises:
        ArtifactError: when it is missing, no npz, or has none of the keys.
    """
    arrays = read_npz(path)
    statistics = {}
    for of, (mean, covariance) in STATISTICS.items():
        if (mean in arrays) != (covariance in arrays):
            raise ArtifactError(f"{path} holds only one of {mean!r} and {covariance!r}. It may be truncated: make it again.")
        if mean in arrays:
            statistics[of] = (torch.from_numpy(arrays[mean]).double(), torch.from_numpy(arrays[covariance]).double())
    pictures = as_pictures(arrays["arr_0"], path) if "arr_0" in arrays else None
    features = torch.from_numpy(arrays["features"]).float() if "features" in arrays else None
    if not statistics and pictures is None and features is None:
        raise ArtifactError(f"{path} holds {', '.join(arrays) or 'nothing'}. A reference holds arr_0 (pictures), or mu and sigma, or both.")
    given = int(arrays["num_pictures"]) if "num_pictures" in arrays else -1
    num = given if given >= 0 else None if pictures is None else len(pictures)
    return Reference(path=Path(path), statistics=statistics, pictures=pictures, features=features,
                     network=str(arrays["network"]) if "network" in arrays else "", num_pictures=num)


def as_pictures(array: np.ndarray, path: str | os.PathLike) -> Tensor:
    """``arr_0`` (N, H, W, C) uint8 as pictures (N, C, H, W)."""
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] not in (1, 3):
        values = describe_values(torch.from_numpy(array)) if array.dtype in (np.float16, np.float32, np.float64) else ""
        raise ArtifactError(f"arr_0 of {path} is {array.dtype} {array.shape}{values}; pictures are uint8 (N, H, W, C), 0..255, with 1 or 3 "
                            "channels.")
    return torch.from_numpy(array).permute(0, 3, 1, 2)


def read_npz(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """All arrays of an npz file; no code in it is run. `ArtifactError` if it is missing, truncated or something else."""
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"There is no file {path}. Check the path.")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise ArtifactError(f"{path} is not a whole npz file of plain arrays ({error}). Make or download it again.") from error


def write_pictures(path: str | os.PathLike, batches: Iterable[tuple[Tensor, Tensor]], *, num_pictures: int) -> None:
    """Write numbered pictures as ``arr_0`` (N, H, W, C) of an npz, in the order of their numbers, without holding them all in memory.

    Args:
        batches: Numbers (n,) and uint8 pictures (n, C, H, W), in any order; every number from 0 to `num_pictures` - 1 once.
    """
    rows = None
    with atomic_path(Path(path).with_suffix(".npz")) as temporary:
        unpacked = temporary.with_suffix(".npy")
        try:
            for numbers, pictures in batches:
                pictures = pictures.permute(0, 2, 3, 1).numpy()  # (n, H, W, C)
                if rows is None:
                    rows = np.lib.format.open_memmap(unpacked, mode="w+", dtype=np.uint8, shape=(num_pictures, *pictures.shape[1:]))
                rows[numbers.numpy()] = pictures
            if rows is None:
                raise ValueError(f"There are no pictures to write to {path}.")
            rows.flush()
            with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
                archive.write(unpacked, "arr_0.npy")
        finally:
            unpacked.unlink(missing_ok=True)


def write_npz(path: str | os.PathLike, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays as npz, whole or not at all."""
    with atomic_path(path) as temporary:
        np.savez(temporary, **arrays)
