"""Tasks for the tests of the command line: they leave files that say who ran them with what."""

import os
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from tinyfusion_pl.artifacts import write_json


class Part:
    """Something that a task is built of."""

    def __init__(self, *, pattern: str) -> None:
        if pattern == "5:4":
            raise ValueError(
                "Pattern '5:4' keeps 5 of 4 blocks. Give N:M with 1 <= N <= M, e.g. '2:4'."
            )
        self.pattern = pattern


def note(part: Part, *, run_dir: Path, seed: int, stages: list[str]) -> str:
    assert type(stages) is list
    write_json(run_dir / "note.json", {"pattern": part.pattern, "seed": seed, "stages": stages})
    return part.pattern


def fail(part: Part, *, run_dir: Path, seed: int, stages: list[str], error: str) -> None:
    if seed == 0:
        raise {"value": ValueError, "bug": KeyError, "interrupt": KeyboardInterrupt}[error](
            "it went wrong"
        )
    note(part, run_dir=run_dir, seed=seed, stages=stages)


QUIET = {"enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}


class _Line(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train_twice_on_two_processes(*, run_dir: Path, seed: int) -> None:
    """Two fits in one task, as the pipeline has them; every process leaves a file."""
    for _ in range(2):
        trainer = Trainer(
            accelerator="cpu", devices=2, strategy="ddp", max_steps=1, logger=False, **QUIET
        )
        trainer.fit(_Line(), DataLoader(TensorDataset(torch.ones(4, 2)), batch_size=2))
    name = f"rank{trainer.global_rank}.json"
    write_json(
        run_dir / name, {"seed": seed, "world_size": trainer.world_size, "process": os.getpid()}
    )
