"""Lightning's checkpoints, written whole or not at all."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from tinyfusion_pl.artifacts import ArtifactError, atomic_path


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes beside the checkpoint's place and renames; tells in a sentence what cannot be written or read.

    Lightning's own writes into the system's temporary folder; where that is another file system, the file is copied to its place bit by
    bit, over the last good one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        content = io.BytesIO()  # torch tells no reason when a file cannot be written
        torch.save(checkpoint, content)
        with atomic_path(path) as temporary:
            temporary.write_bytes(content.getbuffer())

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return super().load_checkpoint(path, *args, **kwargs)
        except Exception as error:  # broken files show as errors of many types
            raise ArtifactError(f"{path} cannot be read: it is truncated or no checkpoint. Delete it, and its stage begins "
                                "anew.") from error
