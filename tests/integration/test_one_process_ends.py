"""A single process of two ends, by SIGTERM or because it dies: both end, and the same command resumes."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

COMMAND = [
    "run_dir=out",
    "pruning=learned",
    "+debug=default",
    "data.batch_size=4",
    "task.stages=[learn_mask]",
    "learn_mask.fit.trainer.max_steps=2000",
    "learn_mask.fit.checkpoint_every_n_steps=2",
    "runtime.devices=2",
    "runtime.accelerator=cpu",
]


def child_of(pid, *, within=60.0):
    """The process that Lightning's launcher started with the same command."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        for task in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((task / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == pid and b"tinyfusion_pl" in (task / "cmdline").read_bytes():
                    return int(task.name)
            except (OSError, IndexError):
                continue
        time.sleep(0.05)
    raise AssertionError("there is no second process")


@contextmanager
def two_in_training(folder):
    """(the first process, the id of the second one) of a command that is killed afterwards."""
    environment = {
        k: v
        for k, v in os.environ.items()
        if k not in ("LOCAL_RANK", "NODE_RANK", "MASTER_PORT", "WORLD_SIZE")
    }
    process = subprocess.Popen([sys.executable, "-m", "tinyfusion_pl", *COMMAND], cwd=folder, env=environment, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    try:
        checkpoint = folder / "out" / "learn_mask" / "checkpoints" / "last.ckpt"
        deadline = time.monotonic() + 200
        while not checkpoint.exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        yield process, child_of(process.pid)
    finally:
        process.kill()


def is_gone(pid):
    return not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text()


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_sigterm_to_one_process_ends_both(tmp_path, rank):
    with two_in_training(tmp_path) as (process, other):
        os.kill(other if rank else process.pid, signal.SIGTERM)
        said, _ = process.communicate(timeout=30)
    assert (
        process.returncode == 75
        and "Rerun the same command to resume" in said
        and "Traceback" not in said
    )
    assert is_gone(other) and not list((tmp_path / "out" / "stages").glob("*"))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 0])
def test_a_process_that_dies_ends_the_other_in_bounded_time(tmp_path, rank):
    with two_in_training(tmp_path) as (process, other):
        os.kill(other if rank else process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
        deadline = time.monotonic() + 60
        while not is_gone(other):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert process.returncode not in (0, None) and not list((tmp_path / "out" / "stages").glob("*"))
