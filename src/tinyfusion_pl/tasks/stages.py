"""The pipeline: stages that run one after the other in a run folder."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from torch import nn

from tinyfusion_pl.data import GenerationDataModule
from tinyfusion_pl.objectives.base import Objective
from tinyfusion_pl.tasks.evaluate import Evaluate
from tinyfusion_pl.tasks.folder import Inputs, RunFolder
from tinyfusion_pl.tasks.learn_mask import LearnMask
from tinyfusion_pl.tasks.outcomes import get_objective
from tinyfusion_pl.tasks.recover import Recover
from tinyfusion_pl.tasks.report import Report
from tinyfusion_pl.tasks.tracking import check_logger, tracked


@dataclass(kw_only=True)
class Pipeline:
    """Runs stages in a run folder, skipping finished ones.

    All stages are built and checked before anything is written or trained, so an invalid setting of
    the last stage costs no time. Calling it with a run folder returns what a sweep minimizes: the
    final FID, or the distance measured instead; None without an evaluation.

    Args:
        stages: Names out of ``learn_mask, recover, evaluate, report``, in this order.
        name: Name of the experiment.
        seed: Seed of the run.
        teacher: The trained denoiser to prune.
        objective: Its objective.
        data: Its training data.
        learn_mask: Stage 1.
        recover: Stage 2.
        evaluate: Stage 3.
        logger: The logger of the stages, ``Fit.logger``. A tracker such as `WandbTracker` also
        shows
            the outcome of each stage, and its run ends with the pipeline.

    Raises:
        ValueError: for unknown stages, settings out of range, a pattern or an objective that does
            not fit the teacher, or data that cannot be evaluated, do not fit the teacher, or have
            fewer samples than there are processes.
    """

    stages: Sequence[str]
    name: str
    seed: int
    teacher: nn.Module
    objective: Objective
    data: GenerationDataModule
    learn_mask: LearnMask
    recover: Recover
    evaluate: Evaluate
    logger: Callable[..., Logger] | None = None

    def __post_init__(self) -> None:
        self.known: dict[str, Any] = {
            "learn_mask": self.learn_mask,
            "recover": self.recover,
            "evaluate": self.evaluate,
            "report": Report(),
        }
        if unknown := [stage for stage in self.stages if stage not in self.known]:
            raise ValueError(
                f"task.stages contains unknown stages {unknown}; available stages: "
                f"{', '.join(self.known)}."
            )
        order = [stage for stage in self.known if stage in self.stages]
        if not order or list(self.stages) != order:
            raise ValueError(
                f"task.stages is {list(self.stages)}; give each stage once, in this order: "
                f"{order or list(self.known)}."
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
        # The processes that the first stage launches also run the later ones.
        if len(set(numbers.values())) > 1:
            raise ValueError(
                "The stages have different numbers of processes: "
                f"{', '.join(f'{stage} {number}' for stage, number in numbers.items())}. Set "
                "runtime.devices and runtime.num_nodes, which apply to all stages, instead of a "
                "single Trainer's settings; or run the stages by separate commands: "
                f"{', '.join(f'task={stage}' for stage in numbers)}."
            )
        for stage in {"learn_mask", "recover"} & set(numbers):
            self.data.check_processes(numbers[stage])

    def __call__(self, *, run_dir: str | Path) -> float | None:
        """Run the stages in `run_dir`."""
        folder = RunFolder(run_dir)
        with tracked(self.logger) as ended:
            for stage in self.stages:
                # A Trainer and its module refer to each other, and would stay in memory.
                gc.collect()
                self.known[stage].run(folder, self.inputs)
                ended(folder.path, stage)
        return get_objective(folder.path)
