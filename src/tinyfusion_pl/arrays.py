"""Reading untrusted npy and npz files: headers are checked first, and no code in a file is run."""

from __future__ import annotations

import math
import os
import stat
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from tinyfusion_pl.artifacts import ArtifactError

MAX_RATIO = 100  # unpacked to packed bytes: arrays compress less, zip bombs 1000 times
MIN_BYTES = 256 << 20  # that an npz file of any size may unpack to


def read_npz(
    path: str | os.PathLike, *, only: Sequence[str]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The arrays named `only` that an npz file has, and the names of its entries.

    Raises:
        ArtifactError: The file is missing, not a regular file or truncated, has something other
            than plain arrays under these names, or unpacks to more than `MAX_RATIO` times its size
            and more than `MIN_BYTES`.
    """
    size = check_regular(path).st_size
    limit, taken, arrays = max(MIN_BYTES, MAX_RATIO * size), 0, {}
    try:
        with zipfile.ZipFile(path) as archive:
            entries: dict[str, zipfile.ZipInfo] = {}
            for entry in archive.infolist():
                name = entry.filename.removesuffix(".npy")
                if name in entries:
                    raise ValueError(f"it holds {name!r} twice")
                entries[name] = entry
            for name in (name for name in only if name in entries):
                taken += entries[name].file_size
                if taken > limit:
                    raise ValueError(
                        f"its arrays unpack to {taken} bytes or more; {limit} are allowed for its "
                        f"{size} bytes"
                    )
                with archive.open(entries[name]) as file:
                    arrays[name] = _read_array(
                        file, num_bytes=entries[name].file_size, what=f"{name!r}: "
                    )
            return arrays, list(entries)
    except Exception as error:  # zipfile, zlib and numpy raise many types, MemoryError included
        raise ArtifactError(
            f"{path} is not a whole npz file of plain arrays ({_said(error)}). Create or download "
            "it again."
        ) from error


def read_npy(path: str | os.PathLike) -> np.ndarray:
    """The array of an npy file; raises as `read_npz`."""
    size = check_regular(path).st_size
    try:
        with Path(path).open("rb") as file:
            return _read_array(file, num_bytes=size)
    except Exception as error:
        raise ArtifactError(
            f"{path} is not a whole npy file of a plain array ({_said(error)})"
        ) from error


def check_regular(path: str | os.PathLike) -> os.stat_result:
    """The status of a regular file or a link to one; pipes, sockets and devices are not opened.

    Raises:
        ArtifactError: There is no such file, or it is not a regular one.
    """
    try:
        state = Path(path).stat()
    except FileNotFoundError as error:
        raise ArtifactError(f"There is no file {path}. Check the path.") from error
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"Cannot read {path}: {getattr(error, 'strerror', None) or error}."
        ) from error
    if not stat.S_ISREG(state.st_mode):
        raise ArtifactError(
            f"{path} is {get_kind(state.st_mode)}, not a regular file. Give a regular file."
        )
    return state


def get_kind(mode: int) -> str:
    """The kind of a file that is not a regular one, in words."""
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def as_floats(
    array: np.ndarray, *, num_dimensions: int, name: str, path: str | os.PathLike
) -> np.ndarray:
    """An array of real numbers as native float64; `ArtifactError` for another kind or rank."""
    if array.dtype.kind not in "fiu" or array.ndim != num_dimensions:
        raise ArtifactError(
            f"{name!r} of {path} is {array.dtype} {array.shape}; expected real numbers of "
            f"{num_dimensions} dimension(s)."
        )
    return array.astype(np.float64)


def _read_array(file: IO[bytes], *, num_bytes: int, what: str = "") -> np.ndarray:
    """The array in `file`, whose header must match the `num_bytes` there are."""
    counting = _Counting(file)
    try:
        version = np.lib.format.read_magic(counting)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read is None:
            raise ValueError(f"npy version {version} is not supported")
        shape, fortran_order, dtype = read(counting)
    except Exception as error:
        raise ValueError(f"{what}it is not an array: {_said(error)}") from error
    if dtype.hasobject:
        raise ValueError(f"{what}it holds Python objects, which are never loaded")
    if (
        any(side < 0 for side in shape)
        or len(shape) > 32
        or (not dtype.itemsize and math.prod(shape) > 1)
    ):
        raise ValueError(f"{what}its shape is {shape}")
    expected = math.prod(shape) * dtype.itemsize  # a Python integer: it does not overflow
    if expected != num_bytes - counting.num_read:
        raise ValueError(
            f"{what}its header states {shape} {dtype}, {expected} bytes, but "
            f"{num_bytes - counting.num_read} follow"
        )
    buffer = bytearray(expected)
    rest = memoryview(buffer)
    while len(rest):
        if not (num := file.readinto(rest[: 16 << 20])):
            raise ValueError(f"{what}it is truncated")
        rest = rest[num:]
    if file.read(1):  # a zip entry's checksum is verified at its end
        raise ValueError(f"{what}more follows than its header states")
    array = np.frombuffer(buffer, dtype) if expected else np.empty(math.prod(shape), dtype)
    return array.reshape(shape, order="F" if fortran_order else "C")


class _Counting:
    """A file that counts the bytes read."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.num_read = file, 0

    def read(self, size: int) -> bytes:
        """Read up to `size` bytes."""
        content = self.file.read(size)
        self.num_read += len(content)
        return content


def _said(error: Any) -> str:
    return str(error).split("\n")[0] or type(error).__name__
