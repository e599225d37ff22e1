"""The command line and environment of each process of a run or sweep."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hydra._internal.utils import get_args_parser
from hydra.conf import HydraConf


@contextmanager
def process(argv: Sequence[str], **environment: str) -> Iterator[None]:
    """Replace ``sys.argv`` and extend the environment inside the block.

    The previous state is restored afterwards, including what distributed training added, so that
    the next job of a sweep starts its own processes.
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


def as_single_run(argv: Sequence[str], job: HydraConf) -> list[str]:
    """The command line of one `job` of the sweep that `argv` starts.

    Lightning's DDP launches its other processes with ``sys.argv``: given the sweep's command line,
    they would run the whole sweep.
    """
    overrides = get_args_parser().parse_args(argv).overrides
    flags = [argument for argument in argv if argument not in (*overrides, "-m", "--multirun")]
    of_hydra = [
        each for each in job.overrides.hydra if not each.startswith(("hydra.mode=", "hydra.sweep"))
    ]
    return [*flags, *job.overrides.task, *of_hydra, "hydra.mode=RUN"]


# The ranks that torchrun, Lightning, SLURM and MPI set.
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
    """Whether every rank in the environment is 0."""
    return all(os.environ.get(name, "0") == "0" for name in RANKS)
