"""The processes of a run and of a sweep: the command line and environment that each of them sees."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig


@contextmanager
def process(argv: Sequence[str], **environment: str) -> Iterator[None]:
    """Another command line and environment for a while; what distributed training left there goes afterwards, so that
    the next job of a sweep starts processes of its own.
    """
    argv_before, environment_before = sys.argv, dict(os.environ)
    sys.argv = list(argv)
    os.environ.update(environment)
    try:
        yield
    finally:
        sys.argv = argv_before
        for name in set(os.environ) - set(environment_before):
            del os.environ[name]
        os.environ.update(environment_before)
        distributed = sys.modules.get("torch.distributed")
        if distributed is not None and distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()


def as_single_run(argv: Sequence[str], job: DictConfig) -> list[str]:
    """The command line of this one job of a sweep. Lightning's DDP starts its other processes with ``sys.argv``: with
    the sweep's they would run the whole sweep.
    """
    overrides = get_args_parser().parse_args(argv).overrides
    flags = [argument for argument in argv if argument not in (*overrides, "-m", "--multirun")]
    of_hydra = [
        each for each in job.overrides.hydra if not each.startswith(("hydra.mode=", "hydra.sweep"))
    ]
    return [*flags, *job.overrides.task, *of_hydra, "hydra.mode=RUN"]


# What torchrun, Lightning, SLURM and MPI number the processes of one run by.
RANKS = (
    "RANK",
    "LOCAL_RANK",
    "NODE_RANK",
    "SLURM_PROCID",
    "JSM_NAMESPACE_RANK",
    "OMPI_COMM_WORLD_RANK",
    "PMI_RANK",
)


def is_first_process() -> bool:
    return all(os.environ.get(name, "0") == "0" for name in RANKS)
