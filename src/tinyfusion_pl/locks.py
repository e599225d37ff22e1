"""Folders and files that one process at a time writes, and the removal of what killed ones left half written."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tinyfusion_pl.artifacts import TEMPORARY, ArtifactError, host_hash

LOCK = ".lock"
# No place for files: whoever writes there is told.
NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)
ABANDONED_AFTER = (
    3600.0  # seconds without a change of a temporary file, where its process cannot be looked at
)

_held: set[Path] = set()  # by this process


@contextmanager
def sole_writer(
    target: str | os.PathLike, *, setting: str, is_folder: bool = True
) -> Iterator[None]:
    """Hold `target` inside the block: no other process that asks for it, on any machine, gets it.

    Temporary files of killed processes are removed first. The lock is the operating system's (POSIX
    record locks: forked workers do not hold it, and it ends with the process); the lock file tells
    others who has it and is removed at the end, as are folders that were made for it and stayed empty.
    In a folder that cannot be written to there is nothing to protect, and no lock.

    Args:
        target: A folder (made if missing), whose lock file is `LOCK` in it; or a file, whose lock file lies beside it.
        setting: Where `target` was given: what the error asks for another value of.
        is_folder: Whether `target` is a folder.

    Raises:
        ArtifactError: when another process holds it; names that process.
    """
    target = Path(target).absolute()
    lock = target / LOCK if is_folder else target.with_name(f".{target.name}{LOCK}")
    if lock in _held:
        yield
        return
    made = [folder for folder in lock.parents if not folder.exists()]
    descriptor = None
    try:
        descriptor = _acquire(lock, target, setting)
        if descriptor is not None:
            _held.add(lock)
            remove_strays(target if is_folder else target.parent, of=None if is_folder else target)
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):
                lock.unlink()  # while it is held: who opened it meanwhile finds that it is gone, see `_acquire`
            os.close(descriptor)
            _held.discard(lock)
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


def _acquire(lock: Path, target: Path, setting: str) -> int | None:
    """The descriptor that holds `lock`; None where there can be none."""
    left = 100  # attempts
    while True:
        left -= 1
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            if error.errno == errno.ENOENT and left:
                continue  # its holder has just removed the folder
            if error.errno in NOT_WRITABLE and (error.errno == errno.EROFS or not _exists(lock)):
                return None
            raise
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _read(descriptor)
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ArtifactError(
                    f"{target} is in use by {_describe(holder)}. Wait until that has finished, or stop it; or give "
                    f"another {setting}."
                ) from None
            with suppress(OSError):
                lock.unlink()
            warnings.warn(
                f"{target} cannot be locked ({error.strerror}): take care that no two processes write there at once.",
                stacklevel=4,
            )
            return None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                _write(descriptor)
                return descriptor
        os.close(descriptor)  # its holder has just removed it


def _exists(path: Path) -> bool:
    with suppress(OSError):
        return path.exists()
    return False


def _write(descriptor: int) -> None:
    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    with suppress(OSError):  # a full disk; the lock holds all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)


def _read(descriptor: int) -> dict[str, Any]:
    try:
        return dict(json.loads(os.pread(descriptor, 4096, 0)))
    except (OSError, ValueError, TypeError):  # it has only just been locked
        return {}


def _describe(holder: dict[str, Any]) -> str:
    if not {"pid", "host", "since"} <= holder.keys():
        return "another process"
    return f"process {holder['pid']} on {holder['host']} (since {holder['since']})"


def remove_strays(folder: Path, *, of: Path | None = None) -> None:
    """Remove temporary files and folders of processes that are gone: under `folder`, or only those of the file `of` in it.

    Only names that `temporary_path` gives are looked at. Those of other machines, and of numbers that
    a living process has, are removed when they have not changed for an hour.
    """
    for parent, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            if (match := TEMPORARY.fullmatch(name)) is None or (
                of is not None and not _is_of(name, of)
            ):
                continue
            path = Path(parent, name)
            with suppress(OSError):
                if (
                    _is_gone(match["host"], int(match["pid"]))
                    or time.time() - path.lstat().st_mtime > ABANDONED_AFTER
                ):
                    shutil.rmtree(path) if name in folders else path.unlink()
        folders[:] = (
            []
            if of is not None
            else [name for name in folders if TEMPORARY.fullmatch(name) is None]
        )


def _is_of(name: str, path: Path) -> bool:
    return name.startswith(f".{path.stem[:40]}.tmp-")


def _is_gone(host: str, pid: int) -> bool:
    if host != host_hash():
        return False
    if (
        pid == os.getpid()
    ):  # of an earlier process that had this number, as in a container that was restarted
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
