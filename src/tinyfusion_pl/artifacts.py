"""Files written whole or not at all: each is written beside its place under another name, then renamed into it."""

import errno
import hashlib
import json
import os
import re
import secrets
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

_REMEDIES = {
    errno.ENOSPC: "Free some space, then run again.",
    errno.EDQUOT: "Free some space, then run again.",
    errno.EROFS: "Choose a folder that can be written to.",
    errno.EACCES: "Choose a folder that can be written to.",
    errno.EPERM: "Choose a folder that can be written to.",
}


# What `temporary_path` gives: the host's hash and the process that writes it, by which a killed one's are known.
TEMPORARY = re.compile(r"\..*\.tmp-(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{8}(\..*)?")


class ArtifactError(RuntimeError):
    """A file that could not be written or read; the text names the file and says what to do."""


def host_hash() -> str:
    """8 hexadecimal digits that stand for this machine in names of temporary files."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def temporary_path(path: Path) -> Path:
    """A new hidden name beside `path` with the same suffix, that says who writes it (`TEMPORARY`)."""
    return path.with_name(
        f".{path.stem[:40]}.tmp-{host_hash()}-{os.getpid()}-{secrets.token_hex(4)}{path.suffix}"
    )


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path in the folder of `path` (made if missing) with the same suffix, to be written inside the block.

    It replaces `path` when the block ends well. When it does not, it is removed and what `path` held stays as it was.
    An `OSError` (full disk, read-only folder) becomes an `ArtifactError` that names `path`; others pass through.
    """
    path = Path(path)
    temporary = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # without it a crash may leave the new name on an empty file
        os.replace(temporary, path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    _sync_folder(path.parent)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` as UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, obj: Any) -> None:
    """Write `obj` as indented JSON. Not-a-number and infinities are no JSON: `ValueError`."""
    try:
        text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"What should go into {path} cannot be written as JSON: {error}."
        ) from error
    write_text(path, text + "\n")


def read_json(path: str | os.PathLike) -> Any:
    """The content of a JSON file. `ArtifactError` if it is missing, unreadable or no JSON."""
    try:
        return json.loads(_existing(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"Cannot read {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{path} is not a JSON file ({error}). It may be truncated: make it again."
        ) from error


def save_tensors(
    path: str | os.PathLike, tensors: dict[str, Tensor], *, metadata: dict[str, str] | None = None
) -> None:
    """Write tensors of any device and layout as safetensors; tied tensors are written once per name."""
    whole, storages = {}, set()
    for key, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        whole[key] = (
            tensor.clone() if storage in storages else tensor
        )  # safetensors refuses shared memory
        storages.add(storage)
    with atomic_path(path) as temporary:
        temporary.touch()  # safetensors makes its file readable by the owner only; an existing file keeps its mode
        mode = temporary.stat().st_mode
        try:
            safetensors.torch.save_file(whole, temporary, metadata=metadata)
        except SafetensorError as error:  # how safetensors says that the disk is full
            raise _cannot_write(Path(path), error) from error
        temporary.chmod(mode)


def load_tensors(
    path: str | os.PathLike, *, only: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or `only` some, on the CPU. `ArtifactError` if it is missing, truncated or something else."""
    try:
        if only is not None:
            with safetensors.safe_open(_existing(path), framework="pt") as file:
                return {name: file.get_tensor(name) for name in only}
        return safetensors.torch.load_file(_existing(path))
    except OSError as error:
        raise ArtifactError(f"Cannot read {path}: {error}.") from error
    except SafetensorError as error:
        raise ArtifactError(
            f"{path} is not a whole safetensors file ({error}). It may be truncated, or of another format: "
            "copy or download it again."
        ) from error


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The strings that a safetensors file holds beside its tensors. `ArtifactError` as for `load_tensors`."""
    try:
        with safetensors.safe_open(_existing(path), framework="pt") as file:
            return dict(file.metadata() or {})
    except OSError as error:
        raise ArtifactError(f"Cannot read {path}: {error}.") from error
    except SafetensorError as error:
        raise ArtifactError(
            f"{path} is not a whole safetensors file ({error}): copy or download it again."
        ) from error


def sha256(path: str | os.PathLike) -> str:
    """The file's SHA-256 as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    try:
        with open(_existing(path), "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise ArtifactError(f"Cannot read {path}: {error.strerror}.") from error
    return digest.hexdigest()


def tensors_sha256(tensors: Mapping[str, Tensor], *, preface: str = "") -> str:
    """The SHA-256 of names and values of tensors, after that of `preface`: the same on any device and in any order of the names."""
    digest = hashlib.sha256(preface.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def _existing(path: str | os.PathLike) -> Path:
    path = Path(path)
    if path.is_dir():
        raise ArtifactError(
            f"{path} is a folder, where a file was expected. Give the file inside it."
        )
    if not path.exists():
        raise ArtifactError(f"There is no file {path}. Check the path.")
    if not path.is_file():
        raise ArtifactError(f"{path} is a named pipe, a socket or a device. Give a regular file.")
    return path


def _cannot_write(path: Path, error: Exception) -> ArtifactError:
    reason = getattr(error, "strerror", None) or str(error)
    remedy = _REMEDIES.get(getattr(error, "errno", None), "Check the path and the disk.")
    return ArtifactError(
        f"Cannot write {path}: {reason}. {remedy} Nothing was left behind under that name."
    )


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # not every file system lets a folder be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
