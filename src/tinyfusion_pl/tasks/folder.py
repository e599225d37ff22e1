"""A run folder: where each stage writes, what is done, and what a stranger reads."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from tinyfusion_pl.artifacts import ArtifactError
from tinyfusion_pl.checksums import Damaged, read_sealed, write_sealed
from tinyfusion_pl.printable import for_terminal


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What every stage works on: the experiment's name and seed, the trained denoiser, its objective and the data."""

    name: str
    seed: int
    teacher: nn.Module
    objective: Any
    data: LightningDataModule


class RunFolder:
    """Paths of a run and the stages that are finished.

    A stage is finished once ``stages/<stage>.json`` exists; it is written last and whole, so an interrupted stage is run again, from its
    last checkpoint. It carries its own checksum and the hash of the configuration that it belongs to.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.configuration = read_configuration(self / "config.yaml")
        """Hash of the configuration that this run is of, for what it leaves; None where it was not started by the command line."""

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def result(self, stage: str) -> dict[str, Any] | None:
        """What `stage` left when it finished; None if it has not.

        Raises:
            ArtifactError: for a damaged mark, or one of another configuration.
        """
        if not (file := self / "stages" / f"{stage}.json").exists():
            return None
        try:
            content = read_sealed(file)
        except Damaged as error:
            raise Damaged(
                f"{error} Delete it: the stage then resumes from what it left, and marks itself again."
            ) from error
        if (
            None not in (self.configuration, of := content.pop("configuration", None))
            and of != self.configuration
        ):
            raise ArtifactError(
                f"{file} belongs to another configuration (hash {of}; this one's is {self.configuration}). Give another "
                "run_dir=PATH, or none: each configuration then gets its own folder."
            )
        return content

    def finish(self, stage: str, result: dict[str, Any]) -> None:
        """Mark `stage` finished with `result`; every process calls it, and none goes on before the mark is there for all to see."""
        content = {"configuration": self.configuration, **result}
        rank_zero_only(write_sealed)(self / "stages" / f"{stage}.json", content)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()

    def checkpoint(self, stage: str) -> Path:
        """The file that `stage` goes on from."""
        return self / stage / "checkpoints" / "last.ckpt"

    @property
    def shallow(self) -> Path:
        """The pruned model before recovery."""
        return self / "shallow"

    @property
    def recovered(self) -> Path:
        """The recovered model."""
        return self / "recovered"


def read_configuration(file: Path) -> str | None:
    """The configuration's hash that a ``config.yaml`` states in a comment at its end; None where it states none, or is not there."""
    if not file.is_file():
        return None
    stated = re.findall(
        r"^# configuration: ([0-9a-f]{8})$",
        file.read_text(encoding="utf-8", errors="replace"),
        re.MULTILINE,
    )
    return stated[-1] if stated else None


@rank_zero_only
def say(line: str) -> None:
    """One line for the person who watches."""
    print(for_terminal(line), flush=True)
