"""Runs stages one after the other in a run folder; the pipeline is all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from torch import nn

from tinyfusion_pl.tasks.evaluate import Evaluate
from tinyfusion_pl.tasks.folder import Inputs, RunFolder
from tinyfusion_pl.tasks.learn_mask import LearnMask
from tinyfusion_pl.tasks.recover import Recover
from tinyfusion_pl.tasks.report import Report


def run_stages(stages: Sequence[str], *, run_dir: str | Path, name: str, seed: int, teacher: nn.Module, objective: Any,
               data: LightningDataModule, learn_mask: LearnMask, recover: Recover, evaluate: Evaluate) -> None:
    """Run `stages`, of ``learn_mask, recover, evaluate, report``, in this order; finished ones are passed over.

    Everything is built before the first of them starts, so a mistake in the last one's configuration costs no training.
    """
    known: Mapping[str, Any] = {"learn_mask": learn_mask, "recover": recover, "evaluate": evaluate, "report": Report()}
    if unknown := [stage for stage in stages if stage not in known]:
        raise ValueError(f"Unknown stages {unknown}; known are {list(known)}.")
    folder = RunFolder(run_dir)
    inputs = Inputs(name=name, seed=seed, teacher=teacher, objective=objective, data=data)
    if "evaluate" in stages:
        data.reference_pictures()  # data that cannot be evaluated are found out now, not after the training
    for stage in stages:
        known[stage].run(folder, inputs)
