"""The processes of a distributed run: all end where one gets SIGTERM, and the others wait for what only the first may do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only

PARENT = "TINYFUSION_PARENT"  # environment variable: the process whose launcher starts this one
EXIT_CODE = 130  # of an interrupted command
PATIENCE = 5.0  # seconds until a process that does not end is killed


def end_together(trainer: Trainer) -> None:
    """From now on, a process of `trainer` that gets SIGTERM while it runs ends all of them, wherever they are.

    Lightning's own handler broadcasts that it was called. Where only one process was, the others are
    in another collective at that time, and all of them wait for ever. Nothing is lost by ending at
    once: what was done since the last checkpoint is lost either way, and files are written whole or
    not at all.

    A single process keeps Lightning's handler, which ends it after its batch; so do SLURM's jobs that requeue themselves.
    """
    environment = trainer.strategy.cluster_environment if hasattr(trainer.strategy, "cluster_environment") else None
    requeues = isinstance(environment, SLURMEnvironment) and environment.auto_requeue
    if trainer.world_size > 1 and not requeues:
        # What Lightning registers when the run begins, and unregisters when it is over.
        trainer._signal_connector._sigterm_notifier_fn = _End(trainer)
        os.environ.setdefault(PARENT, str(os.getpid()))


@contextmanager
def first_alone(make_trainer: Callable[..., Trainer]) -> Iterator[bool]:
    """True in the process that is to do what only one may; the others wait until that has been done, and get False.

    The processes that Lightning starts come when it has been done: the first one starts them with the first training. Those of torchrun
    and SLURM are all there from the beginning. They wait in a gloo group of their own, which may take days, and fails at once when the
    first process ends with an error.

    Args:
        make_trainer: Says how many processes there are, and how they find each other.
    """
    trainer = make_trainer(logger=False, strategy="ddp")
    environment = trainer.strategy.cluster_environment
    if trainer.world_size == 1 or PARENT in os.environ or not environment.creates_processes_externally:
        yield rank_zero_only.rank == 0
        return
    trainer.strategy.setup_environment()  # the trainings that follow use the same connections
    group = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=30))
    if trainer.global_rank == 0:
        yield True
        torch.distributed.barrier(group)
    else:
        torch.distributed.barrier(group)
        yield False


class _End:
    """The handler. It must not wait for the device or another process's collective, so it leaves without cleaning up."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.process = trainer, os.getpid()

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # a worker that was forked off
            os._exit(EXIT_CODE)
        signal.signal(signum, signal.SIG_IGN)
        children: list[subprocess.Popen] = getattr(self.trainer.strategy.launcher, "procs", [])
        for child in children:
            child.send_signal(signum)
        if os.environ.get(PARENT) == str(os.getppid()):  # else whatever started this one looks after the others
            os.kill(os.getppid(), signum)
        _end(children)
        if rank_zero_only.rank == 0:
            print("\nInterrupted. The same command goes on from where it was.", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_CODE)


def _end(children: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + PATIENCE
    for child in children:  # one that waits for the device does not see the signal
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
