"""Lightning's checkpoints, written whole or not at all, and verified when they are read."""

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

# A torch checkpoint is a zip file, which ends with a comment: 2 bytes of length, here 0, and the text.
ZIP_END, ZIP_END_SIZE, NO_COMMENT = b"PK\x05\x06", 22, b"\0\0"
MADE_FROM = "made_from"  # of a checkpoint
SEAL = b"sha256:"
SEAL_SIZE = len(SEAL) + 64
SEAL_LENGTH = SEAL_SIZE.to_bytes(2, "little")


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes beside the checkpoint's place and renames; reports in a sentence what cannot be written or read.

    Lightning's own writes into the system's temporary folder; where that is another file system, the file is copied to its place bit by
    bit, over the last good one.

    The file carries the SHA-256 of its content as the comment of the zip file that it is, so that
    content and checksum are replaced together. torch reads it like any other.

    Args:
        made_from: What the training starts from, name -> checksum. It goes into each checkpoint; one of another
            origin is refused before anything is restored from it. None: neither.
    """

    def __init__(self, made_from: Origin | None = None) -> None:
        super().__init__()
        self.made_from = made_from

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        if self.made_from is not None:
            checkpoint = {**checkpoint, MADE_FROM: self.made_from}
        with atomic_path(path) as temporary, open(temporary, "wb") as opened:
            file = _HashedFile(opened)
            try:
                torch.save(checkpoint, file)
                opened.seek(-len(NO_COMMENT), os.SEEK_END)
                opened.write(SEAL_LENGTH + SEAL + file.digest.hexdigest().encode())
            except Exception:
                if file.error is not None:
                    raise file.error from None
                raise

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read the checkpoint at `path`.

        Raises:
            ArtifactError: when its content is not what was written, or it was made from something else.
        """
        sealed = verify(path)
        try:
            content = super().load_checkpoint(path, *args, **kwargs)
        except Exception as error:  # broken files show as errors of many types
            raise _unreadable(path) from error
        if not sealed:
            warnings.warn(
                f"{path} has no checksum (an earlier version wrote it): damage to it would not be noticed.",
                stacklevel=2,
            )
        if self.made_from is not None and (
            found := differences(content.get(MADE_FROM), self.made_from)
        ):
            raise ArtifactError(
                f"{path} cannot be resumed: it was made from something else ({found}). Put back what it was made "
                "from, or delete it, and its stage begins anew."
            )
        return content


def verify(path: str | Path) -> bool:
    """Compare the checkpoint at `path` with its checksum; returns whether it has one.

    Raises:
        ArtifactError: when it does not match, or the file ends with neither a checksum nor as a zip file does.
    """
    tail = len(SEAL_LENGTH) + SEAL_SIZE
    if not Path(path).is_file():
        raise _unreadable(path)
    with open(path, "rb") as file:
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
    digest.update(NO_COMMENT)  # what stood there when the checksum was made
    if end != SEAL_LENGTH + SEAL + digest.hexdigest().encode():
        raise ArtifactError(
            f"{path} is damaged: its content does not match its checksum. Delete it, and its stage begins anew."
        )
    return True


def _unreadable(path: str | Path) -> ArtifactError:
    return ArtifactError(
        f"{path} cannot be read: it is truncated or no checkpoint. Delete it, and its stage begins anew."
    )


class _HashedFile:
    """A file that hashes what it is given, and remembers why it could not be written: torch does not report it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.error, self.digest = file, None, hashlib.sha256()

    def write(self, data: bytes) -> int:
        try:
            self.digest.update(data)
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()
