"""From one choice to the best of several: proposals without training, then short recoveries."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tinyfusion_pl.pruning.surgery import remove_blocks
from tinyfusion_pl.selection.calibration import Calibration
from tinyfusion_pl.selection.candidates import distinct, sample_structures
from tinyfusion_pl.selection.distilling import Distilling
from tinyfusion_pl.selection.problem import CANDIDATES, TRIALS, Choice, Problem


def propose(
    problem: Problem,
    choice: Choice,
    *,
    num_drawn: int,
    num_scored: int,
    keep: int,
    extra: Sequence[Tensor] = (),
) -> Tensor:
    """The structures closest to the dense model, among likely ones, best first.

    At most `keep`: (<= keep, num_units).

    The best half of `keep` of `extra` always stays: before recovery the distance ranks simple rules
    too low (those that keep the first blocks above all), which trials then find out. Others are
    drawn from its distribution, flattened (half of theta; of a criterion's scores, brought to a
    standard deviation of 2, where nothing was learned), beside the choice itself and what it
    considered. At most `num_scored` distinct drawn ones are scored.
    """
    drawn = []
    if num_drawn and (theta := _theta(choice)) is not None:
        many = sample_structures(
            problem.space, 0.5 * theta, num_drawn, generator=problem.generator(CANDIDATES)
        )
        drawn = list(distinct(many)[:num_scored])
    considered = [] if choice.considered is None else list(choice.considered[:num_scored])
    structures = distinct([choice.structure, *considered, *extra, *drawn])
    order = problem.structures.means(problem.fixed, structures).argsort()
    structures = structures[order]
    is_extra = torch.tensor(
        [any(torch.equal(each, one) for one in extra) for each in structures], dtype=torch.bool
    )
    stays = is_extra & (is_extra.cumsum(0) <= keep // 2)
    others = ~stays & ((~stays).cumsum(0) <= keep - int(stays.sum()))
    return structures[stays | others]


def _theta(choice: Choice) -> Tensor | None:
    if choice.theta is not None or choice.scores is None:
        return choice.theta
    scores = choice.scores.double()
    return 2 * (scores - scores.mean()) / scores.std().clamp_min(1e-12)


@dataclass
class Trials:
    """Successive halving by recovery.

    All candidates train from the original weights on the same samples; the better half continues.

    Each is trained by output distillation (0.9) and data (0.1; by distillation alone where there is
    no loss), AdamW at a constant rate, and scored by the distance of its averaged weights to the
    dense model on fixed samples.

    Args:
        steps: Steps of each round; after it the better half stays, after the last round one.
        batch_size: Samples of a step.
        num_scored: Fixed samples that candidates are scored on.
        lr: Learning rate of AdamW, > 0.
        average_decay: Decay of the averaged weights, in [0, 1); corrected for the start, as Adam's
            averages are.
    """

    steps: Sequence[int] = (10, 20, 30)
    batch_size: int = 128
    num_scored: int = 512
    lr: float = 1e-3
    average_decay: float = 0.99
    history: list[list[dict]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if not self.steps or any(not isinstance(n, int) or n < 1 for n in self.steps):
            raise ValueError(
                f"steps is {list(self.steps)}; give the number of steps of each round, each 1 or "
                "more."
            )
        if self.batch_size < 1 or self.num_scored < 1:
            raise ValueError(
                f"batch_size is {self.batch_size} and num_scored {self.num_scored}; give 1 or more."
            )
        if not self.lr > 0 or not 0 <= self.average_decay < 1:
            raise ValueError(
                f"lr is {self.lr} and average_decay {self.average_decay}; give lr > 0 and a decay "
                "in [0, 1)."
            )

    def __call__(self, problem: Problem, structures: Tensor) -> Tensor:
        """The structure that recovers best; `history` has the distances of every round."""
        runs = [
            _Recovery(problem, structure, lr=self.lr, average_decay=self.average_decay)
            for structure in structures
        ]
        scored = problem.structures.ask(problem.samples(self.num_scored))
        self.history, done = [], 0
        if (before := problem.progress.load("trials")) is not None:
            self.history, done = (
                before["history"],
                before["done"],
            )  # steps of the round that was interrupted
            runs = [
                _Recovery(problem, each["structure"], lr=self.lr, average_decay=self.average_decay)
                for each in before["runs"]
            ]
            for run, state in zip(runs, before["runs"]):
                run.load_state(state)
        samples = problem.stream(
            self.batch_size, TRIALS, sum(self.steps[: len(self.history)]) + done
        )

        def state() -> dict[str, Any]:
            return {"history": self.history, "done": done, "runs": [run.state() for run in runs]}

        for steps in self.steps[len(self.history) :]:
            if len(runs) == 1:
                break
            with problem.progress.steps():
                while done < steps:
                    calibration = problem.structures.ask(next(samples))
                    for run in runs:
                        run.step(calibration)
                    done += 1
                    problem.progress.step("trials", state)
            distances = [run.distance(scored) for run in runs]
            self.history.append(
                [{"structure": run.structure, "distance": d} for run, d in zip(runs, distances)]
            )
            order = sorted(range(len(runs)), key=lambda i: distances[i])
            last = len(self.history) == len(self.steps)
            runs, done = [runs[i] for i in order[: 1 if last else (len(runs) + 1) // 2]], 0
        return runs[0].structure


class _Recovery:
    """One candidate in training."""

    def __init__(
        self, problem: Problem, structure: Tensor, *, lr: float, average_decay: float
    ) -> None:
        self.problem, self.structure = problem, structure
        blocks = problem.space.kept_blocks(structure)
        with problem.structures.without_gates():
            self.student = remove_blocks(copy.deepcopy(problem.model), blocks)
        self.average = copy.deepcopy(self.student).eval().requires_grad_(False)
        self.distilling = Distilling(problem, self.student, lr=lr, which=TRIALS)
        self.decay, self.num_steps, self.num_blocks = (
            average_decay,
            0,
            sum(map(len, blocks.values())),
        )

    def state(self) -> dict[str, Any]:
        return {
            "structure": self.structure,
            "num_steps": self.num_steps,
            "student": self.student.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.distilling.optimizer.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.num_steps = self.distilling.num_steps = state["num_steps"]
        self.student.load_state_dict(state["student"])
        self.average.load_state_dict(state["average"])
        self.distilling.optimizer.load_state_dict(state["optimizer"])

    def step(self, calibration: Calibration) -> None:
        self.distilling.step(calibration, num_blocks=self.num_blocks)
        self.num_steps += 1
        # Of trained weights alone: after few steps most of a plain average would still be the
        # weights before recovery, and so the distance that they have.
        share = (1 - self.decay) / (1 - self.decay**self.num_steps)
        with torch.no_grad():
            pairs = list(zip(self.average.parameters(), self.student.parameters()))
            torch._foreach_lerp_([a for a, _ in pairs], [s.detach() for _, s in pairs], share)

    @torch.no_grad()
    def distance(self, calibration: Calibration) -> float:
        for average, own in zip(self.average.buffers(), self.student.buffers()):  # batch statistics
            average.copy_(own)
        output = self.average(*calibration.args, **calibration.kwargs)
        self.problem.structures.num_block_runs += self.num_blocks * calibration.num_samples
        found = float(calibration.distances(output, torch.arange(calibration.num_samples)).mean())
        return found if found == found else float("inf")  # a recovery that diverged loses
