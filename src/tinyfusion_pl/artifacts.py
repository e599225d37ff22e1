"""Atomic files: each is written under a temporary name, then renamed."""

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


# Names of `temporary_path`: host and process identify the leftovers of killed processes.
TEMPORARY = re.compile(r"\..*\.tmp-(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{8}(\..*)?")


class ArtifactError(RuntimeError):
    """A file could not be read or written; the message names the file and the remedy."""


def host_hash() -> str:
    """8 hexadecimal digits that identify this machine in names of temporary files."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def temporary_path(path: Path) -> Path:
    """A new hidden name beside `path` with its suffix, host and process (`TEMPORARY`)."""
    return path.with_name(
        f".{path.stem[:40]}.tmp-{host_hash()}-{os.getpid()}-{secrets.token_hex(4)}{path.suffix}"
    )


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path with the suffix of `path` in its folder, which is created if missing.

    The file replaces `path` at the end of the block; on an exception it is removed and `path` stays
    unchanged. An `OSError` (full disk, read-only folder) becomes an `ArtifactError` that names
    `path`.
    """
    path = Path(path)
    temporary = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # otherwise a crash may leave an empty file under the new name
        temporary.replace(path)
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
    """Write `obj` as indented JSON; raises `ValueError` for NaN and infinities."""
    try:
        text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Cannot write the content of {path} as JSON: {error}.") from error
    write_text(path, text + "\n")


def read_json(path: str | os.PathLike) -> Any:
    """The content of a JSON file; `ArtifactError` if it is missing, unreadable or not JSON."""
    try:
        return json.loads(_existing(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"Cannot read {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{path} is not a JSON file ({error}). It may be truncated: create it again."
        ) from error


def save_tensors(
    path: str | os.PathLike, tensors: dict[str, Tensor], *, metadata: dict[str, str] | None = None
) -> None:
    """Write tensors of any device and layout as safetensors; tied tensors once per name."""
    whole, storages = {}, set()
    for key, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        # safetensors refuses shared memory
        whole[key] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    with atomic_path(path) as temporary:
        temporary.touch()  # safetensors creates files readable by the owner only
        mode = temporary.stat().st_mode
        try:
            safetensors.torch.save_file(whole, temporary, metadata=metadata)
        except SafetensorError as error:  # safetensors' error for a full disk
            raise _cannot_write(Path(path), error) from error
        temporary.chmod(mode)


def load_tensors(
    path: str | os.PathLike, *, only: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """The tensors of a safetensors file on the CPU, or those named in `only`.

    Raises:
        ArtifactError: The file is missing, truncated or of another format.
    """
    try:
        if only is not None:
            with safetensors.safe_open(_existing(path), framework="pt") as file:
                return {name: file.get_tensor(name) for name in only}
        return safetensors.torch.load_file(_existing(path))
    except OSError as error:
        raise ArtifactError(f"Cannot read {path}: {error}.") from error
    except SafetensorError as error:
        raise ArtifactError(
            f"{path} is not a whole safetensors file ({error}). It may be truncated or of another "
            "format: copy or download it again."
        ) from error


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The metadata of a safetensors file; raises as `load_tensors`."""
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
        with _existing(path).open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise ArtifactError(f"Cannot read {path}: {error.strerror}.") from error
    return digest.hexdigest()


def tensors_sha256(tensors: Mapping[str, Tensor], *, preface: str = "") -> str:
    """The SHA-256 of `preface` and the tensors' names and values.

    It does not depend on the device or the order of the names.
    """
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
        raise ArtifactError(f"{path} is a folder; expected a file. Give the file inside it.")
    if not path.exists():
        raise ArtifactError(f"There is no file {path}. Check the path.")
    if not path.is_file():
        raise ArtifactError(f"{path} is a named pipe, a socket or a device. Give a regular file.")
    return path


def _cannot_write(path: Path, error: Exception) -> ArtifactError:
    reason = getattr(error, "strerror", None) or str(error)
    remedy = _REMEDIES.get(getattr(error, "errno", None), "Check the path and the disk.")
    return ArtifactError(f"Cannot write {path}: {reason}. {remedy} No file was left behind.")


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # not every file system can open folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
