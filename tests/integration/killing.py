"""Runs of the command line in forked processes, which end themselves by a signal at a given step."""

import csv
import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import torch

from tinyfusion_pl import cli
from tinyfusion_pl.artifacts import load_tensors
from tinyfusion_pl.modules import Denoising, Generation
from tinyfusion_pl.tasks import Report

FORK = multiprocessing.get_context("fork")
STEPS = {Denoising: "training_step", Generation: "test_step", Report: "run"}
CHECKPOINTED = ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "DepthPruningCallback", "random_states",
                "global_step", "lr_schedulers")  # fmt: skip


def run(arguments, *, kill=None, signum=signal.SIGKILL, after=False, within=600):
    """The exit code of the command `arguments`, what it printed, and the number of its steps.

    With `kill` it sends itself `signum` before (or after) its step of that number.
    """
    log, steps = Path(arguments[0].partition("=")[2]).with_suffix(".txt"), FORK.Value("i", 0)
    process = FORK.Process(target=_main, args=(arguments, log, steps, kill, signum, after))
    process.start()
    process.join(within)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"not over after {within} s: {log.read_text()[-2000:]}")
    return process.exitcode, log.read_text(), steps.value


def _main(arguments, log, steps, kill, signum, after):
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for owner, name in STEPS.items():
        setattr(owner, name, _counted(getattr(owner, name), steps, kill, signum, after))
    code = cli.main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _counted(step, steps, kill, signum, after):
    def counted(*args, **kwargs):
        steps.value += 1
        number = steps.value
        if number == kill and not after:
            os.kill(os.getpid(), signum)
        result = step(*args, **kwargs)
        if number == kill and after:
            os.kill(os.getpid(), signum)
        return result

    return counted


def outcome(folder):
    """All that a run computes and that does not depend on time."""
    metrics = json.loads((folder / "metrics.json").read_text())
    found = {role: {k: v for k, v in metrics[role].items() if k not in ("images_per_second", "seconds")}
             for role in ("teacher", "pruned", "recovered")}  # fmt: skip
    for name in ("shallow", "recovered"):
        found[f"{name} weights"] = load_tensors(folder / name / "model.safetensors")
        found[f"{name} decision"] = json.loads((folder / name / "record.json").read_text())[
            "stacks"
        ]
    for stage in ("learn_mask", "recover"):
        found[f"{stage} logs"] = rows(folder / "logs" / stage / "metrics.csv")
        checkpoint = torch.load(folder / stage / "checkpoints" / "last.ckpt", weights_only=True)
        found[f"{stage} checkpoint"] = {
            key: checkpoint[key] for key in CHECKPOINTED if key in checkpoint
        }
    if (decisions := folder / "learn_mask" / "decisions.jsonl").exists():
        found["decisions"] = [json.loads(line) for line in decisions.read_text().splitlines()]
    return found


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
