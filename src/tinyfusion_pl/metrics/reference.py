"""Reference files: real images, their statistics or features, in the npz layout of ADM's evaluator.

Keys: ``arr_0``, images, uint8 (N, H, W, C); ``mu`` and ``sigma``, mean and covariance of features;
``mu_s`` and ``sigma_s``, those of spatial features. A file may hold both, as the published ones do:
distances then use the statistics, precision and recall the images. Files written here add
``features`` (N, D), ``network``, the name and checksum of the feature network, and ``num_images``.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from tinyfusion_pl.arrays import as_floats, read_npz
from tinyfusion_pl.artifacts import ArtifactError, atomic_path
from tinyfusion_pl.metrics.features import describe_values

STATISTICS = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
OLD_NUM_IMAGES = "num_pictures"  # key of files written before version 0.2
KEYS = (
    "arr_0",
    "mu",
    "sigma",
    "mu_s",
    "sigma_s",
    "features",
    "network",
    "num_images",
    OLD_NUM_IMAGES,
)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The contents of a reference file.

    Args:
        path: The file, for `write` and error messages.
        statistics: ``"features"`` or ``"spatial"`` -> mean (D,) and covariance (D, D), float64.
        images: uint8 (N, C, H, W) or None.
        features: float32 (N, D) or None.
        network: `GenerationMetrics.fingerprint` of the network that made it; empty if unknown.
        num_images: Number of images behind it, if known.
    """

    path: Path
    statistics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    images: Tensor | None = None
    features: Tensor | None = None
    network: str = ""
    num_images: int | None = None

    def contents(self) -> str:
        """Return a description of the contents for messages."""
        parts = [f"statistics of {of}" for of in self.statistics]
        parts += [name for name in ("images", "features") if getattr(self, name) is not None]
        return " and ".join(parts)

    def write(self) -> None:
        """Write the file to `path` atomically."""
        arrays: dict[str, np.ndarray] = {}
        for of, (mu, sigma) in self.statistics.items():
            arrays |= {name: x.cpu().numpy() for name, x in zip(STATISTICS[of], (mu, sigma))}
        if self.images is not None:
            arrays["arr_0"] = self.images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        if self.features is not None:
            arrays["features"] = self.features.cpu().numpy()
        arrays |= {
            "network": np.array(self.network),
            "num_images": np.array(-1 if self.num_images is None else self.num_images),
        }
        write_npz(self.path, arrays)


def read_reference(path: str | os.PathLike) -> Reference:
    """Read a reference file, written here or published.

    Raises:
        ArtifactError: if it is missing, not an npz file, or has none of the keys.
    """
    arrays, names = read_npz(path, only=KEYS)
    statistics = {}
    for of, (mean, covariance) in STATISTICS.items():
        if (mean in arrays) != (covariance in arrays):
            raise ArtifactError(
                f"{path} holds only one of {mean!r} and {covariance!r}. It may be truncated: make "
                "it again."
            )
        if mean in arrays:
            mu = as_floats(arrays[mean], num_dimensions=1, name=mean, path=path)
            sigma = as_floats(arrays[covariance], num_dimensions=2, name=covariance, path=path)
            if sigma.shape != (len(mu), len(mu)):
                raise ArtifactError(
                    f"{path} holds {mean!r} of shape {mu.shape} and {covariance!r} of shape "
                    f"{sigma.shape}; expected ({len(mu)}, {len(mu)}). Make it again."
                )
            statistics[of] = (torch.from_numpy(mu), torch.from_numpy(sigma))
    images = as_images(arrays["arr_0"], path) if "arr_0" in arrays else None
    features = None
    if "features" in arrays:
        features = torch.from_numpy(
            as_floats(arrays["features"], num_dimensions=2, name="features", path=path)
        ).float()
    if not statistics and images is None and features is None:
        raise ArtifactError(
            f"{path} holds {', '.join(names) or 'nothing'}. Expected arr_0 (images), or mu and "
            "sigma, or both."
        )
    given = arrays.get("num_images", arrays.get(OLD_NUM_IMAGES, np.array(-1)))
    if given.shape != () or given.dtype.kind not in "iu":
        raise ArtifactError(
            f"'num_images' of {path} is {given.dtype} {given.shape}; expected one integer. Make it "
            "again."
        )
    network = arrays.get("network", np.array(""))
    if network.shape != () or network.dtype.kind != "U":
        raise ArtifactError(
            f"'network' of {path} is {network.dtype} {network.shape}; expected one string. Make it "
            "again."
        )
    num = int(given) if given >= 0 else None if images is None else len(images)
    return Reference(
        path=Path(path),
        statistics=statistics,
        images=images,
        features=features,
        network=str(network),
        num_images=num,
    )


def as_images(array: np.ndarray, path: str | os.PathLike) -> Tensor:
    """Return ``arr_0``, uint8 (N, H, W, C), as images (N, C, H, W).

    Raises:
        ArtifactError: for another type or shape; `path` is the file that it names.
    """
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if (
        array.dtype != np.uint8
        or array.ndim != 4
        or array.shape[3] not in (1, 3)
        or 0 in array.shape
    ):
        is_float = array.dtype in (np.float16, np.float32, np.float64) and array.ndim > 0
        values = describe_values(torch.from_numpy(array)) if is_float else ""
        raise ArtifactError(
            f"arr_0 of {path} is {array.dtype} {array.shape}{values}; expected images, uint8 "
            "(N, H, W, C) in 0..255, with 1 or 3 channels."
        )
    return torch.from_numpy(array).permute(0, 3, 1, 2)


def write_images(
    path: str | os.PathLike, batches: Iterable[tuple[Tensor, Tensor]], *, num_images: int
) -> None:
    """Write images to ``arr_0`` (N, H, W, C) of an npz file, one batch in memory at a time.

    Args:
        path: The file to write.
        batches: Numbers (n,) and images, uint8 (n, C, H, W), in any order; each number from 0 to
            `num_images` - 1 once.
        num_images: N.
    """
    rows: np.memmap | None = None
    with atomic_path(Path(path).with_suffix(".npz")) as temporary:
        unpacked = temporary.with_suffix(".npy")
        try:
            for numbers, images in batches:
                arrays = images.permute(0, 2, 3, 1).numpy()  # (n, H, W, C)
                if rows is None:
                    shape = (num_images, *arrays.shape[1:])
                    rows = np.lib.format.open_memmap(
                        unpacked, mode="w+", dtype=np.uint8, shape=shape
                    )
                rows[numbers.numpy()] = arrays
            if rows is None:
                raise ValueError(f"No images to write to {path}.")
            rows.flush()
            with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
                archive.write(unpacked, "arr_0.npy")
        finally:
            unpacked.unlink(missing_ok=True)


def write_npz(path: str | os.PathLike, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays to an npz file atomically."""
    with atomic_path(path) as temporary:
        np.savez(temporary, **cast(dict[str, Any], arrays))
