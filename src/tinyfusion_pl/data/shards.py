"""Latents in a few large files, each image as is and mirrored.

Shard k holds the samples k * shard_size to (k + 1) * shard_size - 1. A folder of latents consists
of ``latents.json``, the description, written last (a folder without it is unfinished), and
``shard-00000.safetensors``, ..., each with ``latents`` (n, 2, C', h, w), whose second dimension is
the image as is or mirrored; ``labels`` (n,) int64; and, if extracted here, ``digests`` (n,) int64,
the first 64 bits of the SHA-256 of each image file (0 if there was none). C' is 2C for mean and
log-variance and C for a sample. Values are unscaled; the scaling factor in ``latents.json`` is
applied on reading.

The values of one sample are contiguous, so a training draw is one positional read. This is as fast
as memory mapping (measured), and fails with an error that names the file; a truncated or lost
mapped file kills the process by a signal (docs/latents.md).
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from tinyfusion_pl.artifacts import ArtifactError, read_json
from tinyfusion_pl.data.latents_info import DTYPES, FINISHED, UNFINISHED, LatentsInfo

VIEWS = 2  # as is, mirrored
DIGESTS = "digests"
NUM_NAMED = 5
MAX_BROKEN = 1000
MAX_STORED = 1e4  # means and log-variances of VAEs stay below 100
UNUSABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    IndexError,
    AttributeError,
    OverflowError,
    RecursionError,
)  # of foreign headers
MAX_OPEN = 128


def shard_path(root: str | os.PathLike, number: int) -> Path:
    """Return the path of a shard."""
    return Path(root) / f"shard-{number:05d}.safetensors"


class LatentShards:
    """The samples in a folder of shards, read in any order, in any number of processes.

    ``info`` describes them; ``labels`` (N,) are in memory. The N samples exclude those that the
    extraction skipped.

    Raises:
        ArtifactError: if the folder is unfinished, or a shard is missing, truncated, or of another
            extraction.
    """

    def __init__(self, root: str | os.PathLike) -> None:
        self.root = Path(root)
        if not (self.root / FINISHED).is_file():
            what = (
                "holds an unfinished extraction: rerun the same task=extract_latents command to "
                "resume it"
                if (self.root / UNFINISHED).exists()
                else f"holds no {FINISHED}: create such a folder with task=extract_latents"
            )
            raise ArtifactError(f"{self.root} {what}.")
        self.info = LatentsInfo.from_dict(read_json(self.root / FINISHED), self.root / FINISHED)
        self.offsets: list[int] = []
        labels: list[np.ndarray] = []
        broken: list[str] = []
        for shard in range(self.info.num_shards):
            try:
                offset, found = check_shard(self.root, self.info, shard)
                self.offsets.append(offset)
                labels.append(found)
            except UNUSABLE as error:
                broken.append(f"{shard_path(self.root, shard)} ({_reason(error)})")
                if len(broken) > MAX_BROKEN:
                    break  # a damaged description may have any number of shards
        if broken:
            more = f", and {len(broken) - NUM_NAMED} more" if len(broken) > NUM_NAMED else ""
            named = ", ".join(broken[:NUM_NAMED]) + more
            raise ArtifactError(
                f"{len(broken)} of {self.info.num_shards} shards cannot be used: {named}. Copy "
                f"them again, or delete them and {FINISHED} and extract again: only what is "
                "missing is extracted."
            )
        stored = np.concatenate(labels)
        kept = np.ones(len(stored), dtype=bool)
        kept[list(self.info.skipped.values())] = False
        if not kept.any() or (stored[kept] < 0).any():
            what = (
                f"sample {int(np.flatnonzero(kept & (stored < 0))[0])} has none"
                if kept.any()
                else "all samples are left out"
            )
            raise ArtifactError(
                f"{self.root / FINISHED} does not match the labels in the shards: {what}. Extract "
                "again."
            )
        # Sample -> its index in the shards; None: the same.
        self.slots = np.flatnonzero(kept) if self.info.skipped else None
        self.labels = stored[kept]
        self._files: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # another process opens its own

    def read(self, index: int, view: int) -> np.ndarray:
        """Return sample `index`, (C', h, w) float32, as is (`view` 0) or mirrored (1)."""
        return self.read_many([index], [view])[0]

    def read_many(self, indices: Sequence[int], views: Sequence[int]) -> np.ndarray:
        """Return several samples, (n, C', h, w) float32.

        Raises:
            ArtifactError: if a shard is now missing, truncated or unreadable, or holds values that
                are not finite, above `MAX_STORED`, or constant.
        """
        if self.slots is not None:
            indices = self.slots[list(indices)].tolist()
        dtype: np.dtype[Any] = DTYPES[self.info.dtype]
        stored = np.empty((len(indices), *self.info.stored_shape), dtype)
        for row, index, view in zip(stored, indices, views):
            self._read_into(row, index, view)
        values = stored.astype(np.float32, copy=False)
        for index, each in zip(indices, values):
            highest, lowest = each.max(), each.min()
            means = each[: self.info.latent_shape[0]]  # of a stored sample: all of it
            if max(highest, -lowest) <= MAX_STORED and (
                means.size == 1 or means.max() > means.min()
            ):  # false for NaN, too
                continue
            what = (
                f"values up to {np.abs(each).max():.3g}"
                if max(highest, -lowest) > MAX_STORED
                else f"the number {means.max():g} alone"
                if np.isfinite(each).all()
                else "values that are not finite"
            )
            raise ArtifactError(
                f"Sample {index} in shard {self._get_path(index)} holds {what}: the file is "
                f"damaged. Delete it and {FINISHED} and extract again: only what is missing is "
                "extracted."
            )
        return values

    def close(self) -> None:
        """Close the open files; reading reopens them."""
        while self._files:
            self._files.popitem()[1].close()

    def _read_into(self, row: np.ndarray, index: int, view: int) -> None:
        shard, place = divmod(index, self.info.shard_size)
        try:
            file = self._files.get(shard) or self._open(shard)
            offset = self.offsets[shard] + (place * VIEWS + view) * row.nbytes
            num_read = os.preadv(file.fileno(), [cast(Any, row)], offset)
        except OSError as error:
            raise ArtifactError(
                f"Sample {index} cannot be read: shard {self._get_path(index)}: {error.strerror}. "
                "It existed when training began; restore it and rerun the same command to resume."
            ) from error
        if num_read != row.nbytes:
            raise ArtifactError(
                f"Sample {index} cannot be read: shard {self._get_path(index)} was truncated since "
                "training began. Restore it and rerun the same command to resume."
            )

    def _get_path(self, index: int) -> Path:
        return shard_path(self.root, index // self.info.shard_size)

    def _open(self, shard: int) -> Any:
        if len(self._files) >= MAX_OPEN:
            self._files.pop(next(iter(self._files))).close()
        self._files[shard] = shard_path(self.root, shard).open("rb", buffering=0)
        return self._files[shard]


def check_shard(root: Path, info: LatentsInfo, shard: int) -> tuple[int, np.ndarray]:
    """Check header and size of a shard; return the offset of its latents, and its labels.

    Raises:
        UNUSABLE: if they are not as expected; see `_reason`.
    """
    path, num = shard_path(root, shard), len(info.samples(shard))
    header, begin, size = read_header(path)
    if header.get("__metadata__") != shard_metadata(info, shard):
        raise ValueError("it belongs to another extraction, or is another shard of this one")
    expected = {"latents": [num, VIEWS, *info.stored_shape], "labels": [num]}
    expected |= {DIGESTS: [num]} if DIGESTS in header else {}
    if (shapes := {name: header[name]["shape"] for name in expected}) != expected:
        raise ValueError(f"it holds {shapes} instead of {expected}")
    dtypes = {
        "latents": {"float32": "F32", "float16": "F16"}[info.dtype],
        "labels": "I64",
        DIGESTS: "I64",
    }
    for name, dtype in ((name, dtypes[name]) for name in expected):
        if header[name]["dtype"] != dtype:
            raise ValueError(
                f"it holds {header[name]['dtype']} instead of "
                f"{info.dtype if name == 'latents' else 'int64'}"
            )
        first, last = header[name]["data_offsets"]
        num_bytes = math.prod(expected[name]) * (
            DTYPES[info.dtype].itemsize if name == "latents" else 8
        )
        if type(first) is not int or first < 0 or last - first != num_bytes:
            raise ValueError(
                f"in its header {name} has the bytes {first} to {last} instead of {num_bytes} bytes"
            )
    if size != (end := begin + max(header[name]["data_offsets"][1] for name in expected)):
        raise ValueError(f"it has {size} bytes instead of {end}")
    with path.open("rb") as file:
        file.seek(begin + header["labels"]["data_offsets"][0])
        labels = np.frombuffer(file.read(8 * num), "<i8")
    return begin + header["latents"]["data_offsets"][0], labels


def shard_metadata(info: LatentsInfo, shard: int) -> dict[str, str]:
    """Return the metadata of a shard: one entry, as safetensors writes several in random order."""
    return {"shard": f"{shard} of {info.fingerprint()}"}


def read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """Read the header of a safetensors file; return it, the offset of the data, and the file size.

    Raises:
        ValueError: for another file.
    """
    state = path.stat()
    if not stat.S_ISREG(state.st_mode):
        raise ValueError("it is not a regular file")
    size = state.st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise ValueError("it is truncated, or not a safetensors file")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("it is not a safetensors file")
    return header, 8 + length, size


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "it is missing"
    if isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)):
        return "it is not a safetensors file"
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)


def posterior_sample(moments: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Return a sample (..., C, h, w) of the Gaussian with mean and log-variance `moments`.

    `moments` is (..., 2C, h, w) and `noise` standard normal (..., C, h, w). The log-variance is
    clamped to [-30, 20], as in diffusers' ``DiagonalGaussianDistribution``.
    """
    mean, log_variance = np.split(moments, 2, axis=-3)
    return mean + np.exp(0.5 * np.clip(log_variance, -30, 20)) * noise  # (..., C, h, w)


def get_generator(seed: int, number: int) -> np.random.Generator:
    """Return a generator (Philox, counter-based) that depends on (seed, number) alone."""
    return np.random.Generator(np.random.Philox(key=[seed, number]))


def normal(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Return standard normal noise, float32."""
    return generator.standard_normal(shape, dtype=np.float32)
