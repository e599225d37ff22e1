"""What tests of a fit share: a small mask learning that can be killed, and all that it leaves."""

import csv
import json
import os
import signal
from functools import partial

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from tinyfusion_pl import DepthPruningCallback, MaskLearning, create_model
from tinyfusion_pl.callbacks import EMAWithWarmup
from tinyfusion_pl.data import DigitsDataModule
from tinyfusion_pl.objectives import GaussianDiffusion
from tinyfusion_pl.tasks import Fit, RunFolder, csv_logger

NUM_STEPS = 9


class Killed(BaseException):
    """What no `except Exception` catches, as a kill."""


class KillAt(Callback):
    """Ends the fit when `batch` batches were trained by this attempt."""

    def __init__(self, batch, how="kill"):
        self.left, self.how = batch, how

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.left -= 1
        if self.left < 0:
            if self.how == "kill":
                raise Killed
            os.kill(os.getpid(), signal.SIGTERM)


def fit(
    folder,
    *,
    accumulate=1,
    every=2,
    kill=None,
    how="kill",
    log_every=2,
    max_steps=NUM_STEPS,
    more=None,
    logger=csv_logger,
    compile=False,
    pruning=None,
    **trainer,
):
    seed_everything(0)
    module = MaskLearning(
        create_model("dit_digits", depth=4, hidden_size=16, num_heads=2),
        objective=GaussianDiffusion(),
    )
    training = Fit(
        trainer=partial(
            Trainer,
            accelerator="cpu",
            devices=1,
            max_steps=max_steps,
            max_epochs=-1,
            accumulate_grad_batches=accumulate,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            log_every_n_steps=log_every,
            **trainer,
        ),
        callbacks={"ema": EMAWithWarmup(decay=0.9)}
        | ({} if kill is None else {"kill": KillAt(kill, how)})
        | (more or {}),
        logger=logger,
        checkpoint_every_n_steps=every,
        compile=compile,
    )
    pruning = DepthPruningCallback(
        "1:2",
        save_dir=folder / "shallow",
        tau_start=2.0,
        decisions_path=folder / "learn_mask" / "decisions.jsonl",
        **(pruning or {}),
    )
    data = DigitsDataModule(batch_size=4)
    training.check("learn_mask", module)
    training.run("learn_mask", RunFolder(folder), module, data, first=[pruning])


def rows(folder):
    with (folder / "logs" / "learn_mask" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def final(folder, *, finished=True):
    """All that the last checkpoint holds, but for the seconds, and the logs."""
    content = torch.load(folder / "learn_mask" / "checkpoints" / "last.ckpt", weights_only=True)
    kept = {
        key: content[key]
        for key in (
            "state_dict",
            "current_model_state",
            "averaging_state",
            "optimizer_states",
            "DepthPruningCallback",
            "random_states",
            "global_step",
            "DigitsDataModule",
        )
    }
    if not finished:
        return kept
    decisions = [
        json.loads(line)
        for line in (folder / "learn_mask" / "decisions.jsonl").read_text().splitlines()
    ]
    return kept | {
        "decisions": decisions,
        "rows": rows(folder),
        "record": (folder / "shallow" / "record.json").read_text(),
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def differing(folder, other):
    a, b = final(folder), final(other)
    return [key for key in a if not same(a[key], b[key])]
