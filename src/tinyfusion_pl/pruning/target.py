"""Whether a shallow model can be written where it is meant to go, found out before training."""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import nn


def check_target(folder: Path, model: nn.Module) -> None:
    """`ValueError` unless a model of the size of `model` can be written into `folder`, which need not exist."""
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not there.is_dir():
        raise ValueError(f"save_dir is {folder}, but {there} is a file. Give the path of a folder.")
    probe = there / f".{folder.name}.write-test"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"save_dir is {folder}, which cannot be written to ({error.strerror}). Give another folder."
        ) from error
    needed = sum(
        t.numel() * t.element_size()
        for t in {id(t): t for t in model.state_dict().values() if t is not None}.values()
    )
    free = shutil.disk_usage(there).free
    if free < needed:
        raise ValueError(f"save_dir is {folder}, where {free / 2**30:.1f} GiB are free; the shallow model may take up to "
                         f"{needed / 2**30:.1f} GiB. Free some space or give another folder.")  # fmt: skip
