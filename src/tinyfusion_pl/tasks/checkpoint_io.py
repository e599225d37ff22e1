"""Lightning's checkpoints, written whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from tinyfusion_pl.artifacts import ArtifactError, atomic_path


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes beside the checkpoint's place and renames; tells in a sentence what cannot be written or read.

    Lightning's own writes into the system's temporary folder; where that is another file system, the file is copied to its place bit by
    bit, over the last good one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        with atomic_path(path) as temporary, open(temporary, "wb") as opened:
            file = _TellingFile(opened)
            try:
                torch.save(checkpoint, file)
            except Exception:
                if file.error is not None:
                    raise file.error from None
                raise

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return super().load_checkpoint(path, *args, **kwargs)
        except Exception as error:  # broken files show as errors of many types
            raise ArtifactError(f"{path} cannot be read: it is truncated or no checkpoint. Delete it, and its stage begins "
                                "anew.") from error


class _TellingFile:
    """A file that remembers why it could not be written: torch does not tell."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.error = file, None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()
