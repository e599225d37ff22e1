"""Work that only the first process of a distributed run does, while the others wait."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only

PARENT = "TINYFUSION_PARENT"  # environment variable: the process whose launcher starts this one


@contextmanager
def first_alone(make_trainer: Callable[..., Trainer]) -> Iterator[bool]:
    """Yield True in the first process; the others wait until its block ends, and get False.

    Lightning launches its processes later, with the first training. Those of torchrun and SLURM
    exist
    from the beginning: they wait in a gloo group with a timeout of days, which fails at once if the
    first process ends with an error.

    Args:
        make_trainer: Factory of a Trainer with the number of processes and their environment.
    """
    environment = getattr(make_trainer(logger=False).strategy, "cluster_environment", None)
    if environment is None or PARENT in os.environ or not environment.creates_processes_externally:
        yield rank_zero_only.rank == 0
        return
    trainer = make_trainer(logger=False, strategy="ddp")
    trainer.strategy.setup_environment()  # later trainings use the same connections
    group = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=30))
    if trainer.global_rank == 0:
        yield True
        torch.distributed.barrier(group)
    else:
        torch.distributed.barrier(group)
        yield False
