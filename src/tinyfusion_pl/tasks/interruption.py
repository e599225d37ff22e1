"""Signals: how all processes of a run stop when one of them gets a signal, and what they save."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only

from tinyfusion_pl.preemption import EXIT_CODE, Preempted, deferred, preemptible, requested
from tinyfusion_pl.tasks.processes import PARENT

PATIENCE = 5.0  # seconds until a process that does not end is killed

_launched: list[list[subprocess.Popen]] = []  # by this process, for each Trainer that it had


@contextmanager
def interruptible(trainer: Trainer, *, at_steps: bool = False) -> Iterator[None]:
    """Handle signals while `trainer` runs inside the block.

    Ctrl-C raises KeyboardInterrupt, which Lightning would turn into an exit. SIGTERM and SIGUSR1
    (or what SLURM is told to send) raise `Preempted`: at once, or with `at_steps` where the fit
    asks for them, `end_if_asked`. A signal to one of several processes ends all of them, wherever
    they are.

    Lightning's own handlers are not used. That of SIGTERM ends a fit within a step, and of several
    processes it makes one wait for the others for ever; that of SLURM saves wherever in a step the
    signal arrives. Its requeueing is, see `end_if_asked`.

    Args:
        trainer: It has not run yet.
        at_steps: Whether what runs inside calls `end_if_asked` after each step.
    """
    trainer._signal_connector._sigterm_notifier_fn = lambda signum, frame: (
        None
    )  # ours is called after it
    slurm, leave = _slurm(trainer), None
    if trainer.world_size > 1:
        os.environ.setdefault(PARENT, str(os.getpid()))
        _launched.append(getattr(trainer.strategy.launcher, "procs", []))
        leave = _end_at_once
    more = () if slurm is None else (slurm.requeue_signal,)
    with preemptible(*more, leave=leave), deferred() if at_steps else nullcontext():
        try:
            yield
        except SystemExit as stop:
            if not isinstance(stop.__context__, KeyboardInterrupt):
                raise
            if isinstance(stop.__context__, Preempted):
                _wait(_children)
            raise stop.__context__ from None
        except RuntimeError as error:
            if requested() and "DataLoader worker" in str(
                error
            ):  # the signal went to the workers too
                raise Preempted(requested()) from error
            raise


def end_if_asked(trainer: Trainer, checkpoint: Path) -> None:
    """Where any process of `trainer` was asked to end: save `checkpoint` and raise `Preempted`.

    All processes call it, when a step has ended. What asks a SLURM job to requeue itself goes to
    Lightning, which saves and requeues.
    """
    signum, slurm = requested(), _slurm(trainer)
    asked = trainer.strategy.reduce_boolean_decision
    if not asked(signum is not None, all=False):
        return
    if slurm is not None and asked(signum == slurm.requeue_signal, all=False):
        trainer._checkpoint_connector.hpc_save_path = lambda folder: str(checkpoint)
        trainer._signal_connector._slurm_sigusr_handler_fn(slurm.requeue_signal, None)
    else:
        trainer.save_checkpoint(checkpoint)
    _children.extend(_take_children())
    raise Preempted(signum)


_children: list[subprocess.Popen] = []  # that end as this process does


def _slurm(trainer: Trainer) -> SLURMEnvironment | None:
    """The environment of a job that requeues itself."""
    environment = trainer._accelerator_connector.cluster_environment
    return (
        environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue
        else None
    )


def _take_children() -> list[subprocess.Popen]:
    """The processes launched by this one, forgotten so that Lightning does not handle them."""
    children = [child for procs in _launched for child in procs]
    for procs in _launched:
        procs.clear()
    return children


def _end_at_once(signum: int) -> None:
    """End this process and the others of its run.

    It must not wait for the device or for another process's collective, so it leaves without
    cleaning up. Nothing is lost by that: files are written whole or not at all.
    """
    signal.signal(signum, signal.SIG_IGN)
    children = _take_children()
    for child in children:
        child.send_signal(signum)
    if os.environ.get(PARENT) == str(
        os.getppid()
    ):  # else whatever started this one looks after the others
        os.kill(os.getppid(), signum)
    _wait(children)
    if rank_zero_only.rank == 0:
        print(f"\n{Preempted(signum)}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_CODE)


def _wait(children: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + PATIENCE
    for child in children:  # one that waits for the device does not see the signal
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
