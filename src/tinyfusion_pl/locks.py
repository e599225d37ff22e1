"""Locks for folders and files with one writer, and removal of what killed writers left behind."""

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
# Nothing can be written there, so that a lock is unnecessary; writing reports the error.
NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)
# Seconds without a change after which a temporary file counts as abandoned, where its process
# cannot be checked.
ABANDONED_AFTER = 3600.0

_held: set[Path] = set()  # by this process


@contextmanager
def sole_writer(
    target: str | os.PathLike, *, setting: str, is_folder: bool = True
) -> Iterator[None]:
    """Hold the lock of `target` inside the block, against other processes on any machine.

    Temporary files of killed processes are removed first. The lock is the operating system's (POSIX
    record locks: forked workers do not hold it, and it ends with the process). The lock file names
    its holder and is removed at the end, as are folders that were created for it and stayed empty.
    A read-only folder needs no lock and gets none.

    Args:
        target: A folder (created if missing), with the lock file `LOCK` inside; or a file, with the
            lock file beside it.
        setting: Setting that gave `target`; the error asks for another value of it.
        is_folder: Whether `target` is a folder.

    Raises:
        ArtifactError: Another process holds the lock; the message names it.
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
                lock.unlink()  # while held: `_acquire` of other processes notices
            os.close(descriptor)
            _held.discard(lock)
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


def _acquire(lock: Path, target: Path, setting: str) -> int | None:
    """The descriptor that holds `lock`; None where none is possible."""
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
                    f"{target} is in use by {_describe(holder)}. Wait until it finishes, stop it, "
                    f"or give another {setting}."
                ) from None
            with suppress(OSError):
                lock.unlink()
            warnings.warn(
                f"{target} cannot be locked ({error.strerror}): make sure that only one process "
                "writes there.",
                stacklevel=4,
            )
            return None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), lock.stat()):
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
    with suppress(OSError):  # a full disk; the lock holds anyway
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)


def _read(descriptor: int) -> dict[str, Any]:
    try:
        return dict(json.loads(os.pread(descriptor, 4096, 0)))
    except (OSError, ValueError, TypeError):  # it was locked a moment ago
        return {}


def _describe(holder: dict[str, Any]) -> str:
    if not {"pid", "host", "since"} <= holder.keys():
        return "another process"
    return f"process {holder['pid']} on {holder['host']} (since {holder['since']})"


def remove_strays(folder: Path, *, of: Path | None = None) -> None:
    """Remove temporary files and folders of dead processes under `folder`.

    Only names of `temporary_path` are considered. Those of other machines, and of process numbers
    that are in use, are removed when they have not changed for an hour.

    Args:
        folder: Searched recursively.
        of: Remove only temporary files of this file in `folder`.
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
    if pid == os.getpid():  # an earlier process with this number, as in a restarted container
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
