"""Signals that schedulers send: a fit saves where its step ends, and the same fit resumes from there."""

import os
import signal
import stat
import threading

import pytest
from lightning.pytorch import Callback

from tasks.toy_fit import differing, final, fit, rows
from tinyfusion_pl.preemption import Preempted, deferred, preemptible, requested


class Send(Callback):
    """Sends signals to this process when `batch` batches were begun."""

    def __init__(self, batch, *signums, at="on_train_batch_start"):
        self.left, self.signums = batch, signums
        setattr(self, at, self.send)

    def send(self, *_):
        self.left -= 1
        if self.left == 0:
            for signum in self.signums:
                os.kill(os.getpid(), signum)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folders = {n: tmp_path_factory.mktemp(f"whole{n}") for n in (1, 2)}
    for accumulate, folder in folders.items():
        fit(folder, accumulate=accumulate)
    return folders


@pytest.mark.parametrize(
    ("accumulate", "batch", "signums", "saved"),
    [
        (1, 4, [signal.SIGTERM], 4),
        (2, 5, [signal.SIGUSR1], 3),  # within a step
        (
            2,
            3,
            [signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1],
            2,
        ),  # as a scheduler and its launcher send them
    ],
)
def test_a_signal_saves_the_step_and_nothing_differs(
    whole, tmp_path, accumulate, batch, signums, saved
):
    with pytest.raises(
        Preempted, match=f"Stopped by {signums[0].name}. Rerun the same command to resume"
    ):
        fit(tmp_path, accumulate=accumulate, every=100, more={"send": Send(batch, *signums)})
    assert final(tmp_path, finished=False)["global_step"] == saved
    assert not (tmp_path / "shallow").exists()
    fit(tmp_path, accumulate=accumulate, every=100)
    assert differing(tmp_path, whole[accumulate]) == []


@pytest.mark.parametrize("at", ["on_fit_start", "on_train_end"])
def test_a_signal_before_the_first_step_or_after_the_last_waits(whole, tmp_path, at):
    with pytest.raises(Preempted):
        fit(tmp_path, every=100, more={"send": Send(1, signal.SIGTERM, at=at)})
    assert final(tmp_path, finished=False)["global_step"] == (1 if at == "on_fit_start" else 9)
    fit(tmp_path, every=100)
    assert differing(tmp_path, whole[1]) == []


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """The environment of a SLURM job, and what `scontrol` was called with."""
    said = tmp_path / "said"
    (command := tmp_path / "bin" / "scontrol").parent.mkdir()
    command.write_text(f'#!/bin/sh\necho "$@" >> {said}\n')
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    for name, value in {
        "NTASKS": 1,
        "JOB_ID": 77,
        "JOB_NAME": "search",
        "PROCID": 0,
        "LOCALID": 0,
        "NODEID": 0,
    }.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    return said


@pytest.mark.parametrize(
    ("signum", "requeued"), [(signal.SIGUSR1, "requeue 77\n"), (signal.SIGTERM, None)]
)
def test_a_slurm_job_requeues_itself_at_a_step(slurm, tmp_path, signum, requeued):
    """SIGUSR1 as Lightning has it; SIGTERM is what SLURM sends when it has decided itself."""
    run = tmp_path / "run"
    with pytest.raises(Preempted):
        fit(run, accumulate=2, every=100, more={"send": Send(5, signum)})
    assert (slurm.read_text() if slurm.exists() else None) == requeued
    assert final(run, finished=False)["global_step"] == 3 and not list(run.rglob("hpc*"))


def test_handlers_are_as_before_afterwards(tmp_path):
    before = {
        signum: signal.getsignal(signum)
        for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    }
    with pytest.raises(Preempted):
        fit(tmp_path, more={"send": Send(2, signal.SIGUSR1)})
    after = {signum: signal.getsignal(signum) for signum in before}
    assert {
        **after,
        signal.SIGINT: before[signal.SIGINT],
    } == before  # Lightning ignores Ctrl-C after an interruption
    signal.signal(signal.SIGINT, before[signal.SIGINT])
    assert requested() is None


def test_outside_a_fit_a_signal_ends_at_once():
    with preemptible(), pytest.raises(Preempted), deferred():
        os.kill(os.getpid(), signal.SIGUSR1)
        assert requested() == signal.SIGUSR1
    with preemptible(), pytest.raises(Preempted, match="SIGTERM"):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("went on")


def test_other_threads_may_train_without_signals(tmp_path):
    ended = []
    thread = threading.Thread(target=lambda: ended.append(fit(tmp_path, max_steps=1)))
    thread.start()
    thread.join()
    assert ended and rows(tmp_path)
