"""Atomic writing of Lightning's checkpoints, with a checksum that is verified on loading."""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from tinyfusion_pl.artifacts import ArtifactError, atomic_path
from tinyfusion_pl.checksums import Origin, differences

# A torch checkpoint is a zip file, which ends with a comment: its length in 2 bytes, here 0, and
# text.
ZIP_END, ZIP_END_SIZE, NO_COMMENT = b"PK\x05\x06", 22, b"\0\0"
MADE_FROM = "made_from"  # of a checkpoint
SEAL = b"sha256:"
SEAL_SIZE = len(SEAL) + 64
SEAL_LENGTH = SEAL_SIZE.to_bytes(2, "little")


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file beside it, then renames it.

    Lightning's own plugin writes to the system's temporary folder; on another file system, copying
    the file from there may leave a partial one in place of the last good checkpoint.

    The comment of the zip file is the SHA-256 of its content, so that content and checksum are
    replaced together. torch reads the file like any other.

    Args:
        made_from: Origin of the training, name -> checksum, saved in each checkpoint; loading one
        of
            another origin raises an error. None: not saved or checked.
    """

    def __init__(self, made_from: Origin | None = None) -> None:
        super().__init__()
        self.made_from = made_from

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write the checkpoint and its checksum."""
        if self.made_from is not None:
            checkpoint = {**checkpoint, MADE_FROM: self.made_from}
        with atomic_path(path) as temporary, Path(temporary).open("wb") as opened:
            file = _HashedFile(opened)
            try:
                torch.save(checkpoint, file)  # type: ignore[arg-type]  # only writes
                opened.seek(-len(NO_COMMENT), os.SEEK_END)
                opened.write(SEAL_LENGTH + SEAL + file.digest.hexdigest().encode())
            except Exception:
                if file.error is not None:
                    raise file.error from None
                raise

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read the checkpoint at `path`.

        Raises:
            ArtifactError: if it is damaged, or has another origin.
        """
        sealed = verify(path)
        try:
            content = super().load_checkpoint(path, *args, **kwargs)
        except Exception as error:  # broken files show as errors of many types
            raise _unreadable(path) from error
        if not sealed:
            warnings.warn(
                f"{path} has no checksum (an earlier version wrote it): damage cannot be detected.",
                stacklevel=2,
            )
        if self.made_from is not None and (
            found := differences(content.get(MADE_FROM), self.made_from)
        ):
            raise ArtifactError(
                f"Cannot resume from {path}: it has another origin ({found}). Restore its inputs, "
                "or delete it to start the stage again."
            )
        return content


def verify(path: str | Path) -> bool:
    """Compare the checkpoint at `path` with its checksum; returns whether it has one.

    Raises:
        ArtifactError: if it does not match, or the file does not end like a checkpoint.
    """
    tail = len(SEAL_LENGTH) + SEAL_SIZE
    if not Path(path).is_file():
        raise _unreadable(path)
    with Path(path).open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - tail))
        end = file.read()
        if end[-ZIP_END_SIZE:].startswith(ZIP_END) and end.endswith(NO_COMMENT):
            return False
        if not end.startswith(SEAL_LENGTH + SEAL):
            raise _unreadable(path)
        digest, rest = hashlib.sha256(), max(0, size - tail)
        file.seek(0)
        while rest and (chunk := file.read(min(1 << 20, rest))):
            digest.update(chunk)
            rest -= len(chunk)
    digest.update(NO_COMMENT)  # which the checksum has replaced
    if end != SEAL_LENGTH + SEAL + digest.hexdigest().encode():
        raise ArtifactError(
            f"{path} is damaged: its content does not match its checksum. Delete it to start the "
            "stage again."
        )
    return True


def _unreadable(path: str | Path) -> ArtifactError:
    return ArtifactError(
        f"Could not read {path}: it is truncated or not a checkpoint. Delete it to start the stage "
        "again."
    )


class _HashedFile:
    """A file that hashes its content and keeps write errors, which torch does not report."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            self.digest.update(data)
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()
