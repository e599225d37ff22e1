"""A run folder: where each stage writes, and which stages are finished."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only

from tinyfusion_pl.artifacts import ArtifactError
from tinyfusion_pl.checksums import Damaged, read_sealed, write_sealed
from tinyfusion_pl.data import GenerationDataModule
from tinyfusion_pl.objectives.base import Objective
from tinyfusion_pl.printable import for_terminal


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The inputs of every stage.

    Args:
        name: Name of the experiment.
        seed: Seed of the run.
        teacher: The trained denoiser.
        objective: The objective that it was trained with.
        data: The data that it was trained on.
    """

    name: str
    seed: int
    teacher: Any
    objective: Objective
    data: GenerationDataModule


class RunFolder:
    """The paths of a run, and its finished stages.

    A stage is finished once ``stages/<stage>.json`` exists. The file is written last and
    atomically, so an interrupted stage resumes from its last checkpoint. It contains its own
    checksum and the hash of the configuration.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.configuration = read_configuration(self / "config.yaml")
        """Hash of the run's configuration; None for a run that the command line did not start."""

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def result(self, stage: str) -> dict[str, Any] | None:
        """The result of `stage`; None if it is not finished.

        Raises:
            ArtifactError: if the file is damaged, or belongs to another configuration.
        """
        if not (file := self / "stages" / f"{stage}.json").exists():
            return None
        try:
            content = read_sealed(file)
        except Damaged as error:
            raise Damaged(
                f"{error} Delete it: the stage then resumes from its files and writes it again."
            ) from error
        if (
            None not in (self.configuration, of := content.pop("configuration", None))
            and of != self.configuration
        ):
            raise ArtifactError(
                f"{file} belongs to another configuration (hash {of}; the hash of this one is "
                f"{self.configuration}). Give another run_dir=PATH, or omit it: each configuration "
                "gets its own folder."
            )
        return content

    def get_result(self, stage: str) -> dict[str, Any]:
        """The result of a finished stage."""
        done = self.result(stage)
        assert done is not None, f"{stage} is not finished"
        return done

    def finish(self, stage: str, result: dict[str, Any]) -> None:
        """Mark `stage` as finished with `result`.

        Every process calls it, and returns once the file is visible to all of them.
        """
        content = {"configuration": self.configuration, **result}
        rank_zero_only(write_sealed)(self / "stages" / f"{stage}.json", content)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()

    def checkpoint(self, stage: str) -> Path:
        """The checkpoint that `stage` resumes from."""
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
    """The configuration's hash in the last comment of a ``config.yaml``; None if there is none."""
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
    """Print one line of progress, in the first process."""
    print(for_terminal(line), flush=True)
