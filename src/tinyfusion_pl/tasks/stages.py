"""Runs stages one after the other in a run folder; the pipeline is all of them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.loggers import Logger
from torch import nn

from tinyfusion_pl.tasks.evaluate import Evaluate
from tinyfusion_pl.tasks.folder import Inputs, RunFolder
from tinyfusion_pl.tasks.learn_mask import LearnMask
from tinyfusion_pl.tasks.outcomes import get_objective
from tinyfusion_pl.tasks.recover import Recover
from tinyfusion_pl.tasks.report import Report
from tinyfusion_pl.tasks.tracking import check_logger, tracked


@dataclass(kw_only=True)
class Pipeline:
    """`stages`, of ``learn_mask, recover, evaluate, report``, in this order; call it with a run folder. Finished stages are passed over.

    Everything is built and checked before anything is written or trained, so a mistake in the last stage's configuration costs nothing.
    Called, it returns what a sweep minimizes: the final FID, or the distance that was measured in its place; None without an evaluation.

    `logger` is the stages' own (``Fit.logger``): where it is a tracker, as `WandbTracker`, it shows what each stage left, and its run ends
    with the pipeline.

    Raises:
        ValueError: for unknown stages, settings out of range, a pattern or an objective that does not fit the teacher, data that cannot be
            evaluated, do not fit the teacher, or are fewer samples than processes.
    """

    stages: Sequence[str]
    name: str
    seed: int
    teacher: nn.Module
    objective: Any
    data: LightningDataModule
    learn_mask: LearnMask
    recover: Recover
    evaluate: Evaluate
    logger: Callable[..., Logger] | None = None

    def __post_init__(self) -> None:
        self.known = {
            "learn_mask": self.learn_mask,
            "recover": self.recover,
            "evaluate": self.evaluate,
            "report": Report(),
        }
        if unknown := [stage for stage in self.stages if stage not in self.known]:
            raise ValueError(
                f"task.stages has {unknown}, which are no stages; known are {list(self.known)}."
            )
        order = [stage for stage in self.known if stage in self.stages]
        if not order or list(self.stages) != order:
            raise ValueError(
                f"task.stages is {list(self.stages)}; give each stage once and in this order: {order or list(self.known)}."
            )
        self.inputs = Inputs(
            name=self.name,
            seed=self.seed,
            teacher=self.teacher,
            objective=self.objective,
            data=self.data,
        )
        if set(self.stages) - {"report"}:
            self.data.check_fits(self.teacher)
            self.objective.check_fits(self.teacher)
        check_logger(self.logger)
        for stage in self.stages:
            self.known[stage].check(self.inputs)
        if "recover" in self.stages:
            self.recover.check_follows(self.learn_mask)
        numbers = {
            stage: self.known[stage].num_processes() for stage in self.stages if stage != "report"
        }
        numbers = {stage: number for stage, number in numbers.items() if number is not None}
        if (
            len(set(numbers.values())) > 1
        ):  # the processes that the first stage starts run all that follow
            raise ValueError(
                f"The stages run on different numbers of processes: {', '.join(f'{k} {n}' for k, n in numbers.items())}. Set "
                "runtime.devices and runtime.num_nodes, which hold for all of them, in place of a single Trainer's; or run "
                f"them one after the other: {', '.join(f'task={stage}' for stage in numbers)}."
            )
        for stage in {"learn_mask", "recover"} & set(numbers):
            self.data.check_processes(numbers[stage])

    def __call__(self, *, run_dir: str | Path) -> float | None:
        folder = RunFolder(run_dir)
        with tracked(self.logger) as ended:
            for stage in self.stages:
                gc.collect()  # a Trainer and its module refer to each other: without it two stages' models lie in memory
                self.known[stage].run(folder, self.inputs)
                ended(folder.path, stage)
        return get_objective(folder.path)
