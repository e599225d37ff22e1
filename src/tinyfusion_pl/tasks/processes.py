"""The processes of a distributed run: the others wait for what only the first may do."""

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
    """True in the process that is to do what only one may; the others wait until that has been done, and get False.

    The processes that Lightning starts come when it has been done: the first one starts them with the first training. Those of torchrun
    and SLURM are all there from the beginning. They wait in a gloo group of their own, which may take days, and fails at once when the
    first process ends with an error.

    Args:
        make_trainer: Says how many processes there are, and how they find each other.
    """
    environment = getattr(make_trainer(logger=False).strategy, "cluster_environment", None)
    if environment is None or PARENT in os.environ or not environment.creates_processes_externally:
        yield rank_zero_only.rank == 0
        return
    trainer = make_trainer(logger=False, strategy="ddp")
    trainer.strategy.setup_environment()  # the trainings that follow use the same connections
    group = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=30))
    if trainer.global_rank == 0:
        yield True
        torch.distributed.barrier(group)
    else:
        torch.distributed.barrier(group)
        yield False
