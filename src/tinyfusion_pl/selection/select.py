"""The door to every criterion: choose which blocks of a model stay."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion_pl.pruning.budget import both_or_neither
from tinyfusion_pl.pruning.decision import Decision
from tinyfusion_pl.selection.calibration import Calibration
from tinyfusion_pl.selection.candidates import distributions
from tinyfusion_pl.selection.criteria.block_influence import FluxLite, ShortGPT
from tinyfusion_pl.selection.criteria.candidate_loss import CandidateLoss
from tinyfusion_pl.selection.criteria.cka import CKA
from tinyfusion_pl.selection.criteria.global_search import GlobalSearch, marginals
from tinyfusion_pl.selection.criteria.greedy import Greedy
from tinyfusion_pl.selection.criteria.rules import First, Oracle, Random, Uniform
from tinyfusion_pl.selection.criteria.sensitivity import Sensitivity
from tinyfusion_pl.selection.criteria.weights import Magnitude, Taylor
from tinyfusion_pl.selection.problem import Choice, Criterion, Problem, get_devices
from tinyfusion_pl.selection.progress import Progress
from tinyfusion_pl.selection.space import Space
from tinyfusion_pl.selection.structures import MAX_ROWS, open_structures
from tinyfusion_pl.selection.trials import Trials, propose

CRITERIA: dict[str, Callable[[], Criterion]] = {
    "global": GlobalSearch,
    "shortgpt": ShortGPT,
    "flux_lite": FluxLite,
    "sensitivity": Sensitivity,
    "taylor": Taylor,
    "magnitude": Magnitude,
    "oracle": Oracle,
    "uniform": Uniform,
    "first": First,
    "random": Random,
    "greedy": Greedy,
    "cka": CKA,
    "min_loss": CandidateLoss,
    "median_loss": lambda: CandidateLoss("median"),
    "max_loss": lambda: CandidateLoss("max"),
}
"""Criteria that need no argument, by name."""


@dataclass
class Selected:
    """What `Selection` found.

    Attributes:
        decision: The units that stay, with scores and probabilities.
        num_block_runs: What the choice cost: blocks times samples, a backward pass counted as two
            forward passes.
        simple_rule: What ShortGPT would have kept, by stack path; None where it was not asked.
        history: Of each step of a search: step, mean loss, decision.
        rounds: Distances of the trials, by round.
        shallow: The model that is left, where more than blocks goes; None: the dense one without
            the blocks that go.
        width: What `WidthPruning` left of the width, for the record.
        intervals: Of its intervals of time: first and last time, mean loss, and whether it counted.
    """

    decision: Decision
    num_block_runs: int
    simple_rule: dict[str, list[int]] | None
    history: list[dict[str, Any]]
    rounds: list[list[dict[str, Any]]]
    shallow: nn.Module | None = None
    width: dict[str, Any] | None = None
    intervals: list[dict[str, Any]] | None = None


class Selection:
    """A criterion, a budget, and the options that every criterion can be followed by.

    Args:
        criterion: A `Criterion`, or the name of one (`CRITERIA`).
        keep, pattern, stacks, units: The budget, see `Space`.
        candidates: Structures that are kept for trials, proposed around the choice and scored by
            their distance to the dense model; 0: the criterion's own choice stands.
        num_drawn, num_scored: How many structures are drawn for that, and how many distinct ones of
            them are scored.
        trial_steps: Steps of each round of trials (see `Trials`); empty: the nearest candidate is
            taken.
        trials: Further settings of the trials.
        num_samples: Samples on which structures are scored.
        max_rows: Bound of structures times samples in one forward pass.
        with_simple_rule: Also find out what ShortGPT would keep, for the report.

    Raises:
        ValueError: for an unknown criterion or numbers out of range.
    """

    def __init__(
        self,
        criterion: Criterion | str = "global",
        *,
        keep: Any = None,
        pattern: Any = None,
        stacks: str | Sequence[str] | None = None,
        units: Any = None,
        candidates: int = 0,
        num_drawn: int = 800,
        num_scored: int = 200,
        trial_steps: Sequence[int] = (),
        trials: Mapping[str, Any] | None = None,
        num_samples: int = 128,
        max_rows: int = MAX_ROWS,
        with_simple_rule: bool = True,
    ) -> None:
        if isinstance(criterion, str):
            if criterion not in CRITERIA:
                raise ValueError(f"criterion is {criterion!r}; give one of {', '.join(CRITERIA)}.")
            criterion = CRITERIA[criterion]()
        for name, value, least in (
            ("candidates", candidates, 0),
            ("num_drawn", num_drawn, 0),
            ("num_scored", num_scored, 1),
            ("num_samples", num_samples, 2),
            ("max_rows", max_rows, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}; give a whole number, {least} or more.")
        if trial_steps and candidates < 2:
            raise ValueError(
                f"trial_steps is {list(trial_steps)}, but candidates is {candidates}: give 2 or "
                "more to try."
            )
        if max_rows < num_samples:
            raise ValueError(
                f"max_rows is {max_rows}, less than num_samples={num_samples}. Give more rows, or "
                "fewer samples."
            )
        if (keep is None) == (pattern is None):
            raise ValueError(both_or_neither(keep, pattern))
        self.criterion, self.candidates, self.num_drawn, self.num_scored = (
            criterion,
            candidates,
            num_drawn,
            num_scored,
        )
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in trial_steps):
            raise ValueError(
                f"trial_steps is {list(trial_steps)}; give the number of steps of each round, "
                "each 1 or more."
            )
        known = [field.name for field in fields(Trials) if field.init and field.name != "steps"]
        if unknown := [name for name in trials or {} if name not in known]:
            raise ValueError(
                f"trials has the settings {unknown}, which there are not; available settings: "
                f"{', '.join(known)}."
            )
        self.trials = Trials(steps=tuple(trial_steps), **(trials or {})) if trial_steps else None
        self.num_samples, self.max_rows, self.with_simple_rule = (
            num_samples,
            max_rows,
            with_simple_rule,
        )
        self._space = {"keep": keep, "pattern": pattern, "stacks": stacks, "units": units}

    @property
    def name(self) -> str:
        """The criterion's."""
        return self.criterion.name

    def space(self, model: nn.Module) -> Space:
        """The structures of `model` that are allowed.

        Raises:
            ValueError: when the budget does not fit the model.
        """
        return Space(model, **self._space)

    def check(self, model: nn.Module) -> None:
        """Find out whether budget and criterion fit `model`, before anything runs.

        Raises:
            ValueError: when they do not; says what would.
        """
        space = self.space(model)
        if (check := getattr(self.criterion, "check", None)) is not None:
            check(space)

    def __call__(
        self,
        model: nn.Module,
        draw: Callable[[int], Calibration],
        *,
        seed: int = 0,
        watch: Callable[[dict[str, Any]], None] = lambda entry: None,
        progress: Progress | None = None,
    ) -> Selected:
        """Choose; `model` is left as it is.

        Args:
            model: The dense, trained model.
            draw: Makes a `Calibration` of so many samples.
            seed: Of all randomness.
            watch: Called at each step of a search with its entry of `Selected.history`.
            progress: Keeps the steps of the global search and of trials: the same call resumes
                after the last one.
        """
        space = self.space(model)
        history: list[dict[str, Any]] = []

        def on_step(steps: list[dict[str, Any]]) -> None:
            for each in steps[len(history) :]:
                decision = self._decision(space, each["structure"], each["theta"])
                history.append({"step": each["step"], "loss": each["loss"], "decision": decision})
                watch(history[-1])

        with (
            torch.random.fork_rng(get_devices(model)),
            open_structures(model, space, max_rows=self.max_rows) as structures,
        ):
            problem = Problem(
                structures,
                draw,
                num_samples=self.num_samples,
                seed=seed,
                on_step=on_step,
                progress=progress,
            )
            structures.ask(problem.fixed)  # checks that structures can be run side by side
            simple = self._simple_rule(problem) if self.with_simple_rule else None
            before = structures.num_block_runs  # that the report asks costs nothing here
            if (kept := problem.progress.load("choice")) is None:
                choice = self.criterion(problem)
                problem.progress.save("choice", vars(choice))
            else:
                choice = Choice(**kept)
            on_step(choice.history)
            how, structure, rounds = self.criterion.name, choice.structure, []
            if self.candidates:
                found = propose(
                    problem,
                    choice,
                    num_drawn=self.num_drawn,
                    num_scored=self.num_scored,
                    keep=self.candidates,
                    extra=self._cheap(problem),
                )
                structure, how = found[0], f"{how}, nearest of the candidates"
                if self.trials is not None and len(found) > 1:
                    structure, how = (
                        self.trials(problem, found),
                        f"{self.criterion.name}, best of {len(found)} in trials",
                    )
                    rounds = self.trials.history
            decision = (
                space.decision(structure, criterion=how, scores=choice.scores)
                if choice.theta is None
                else self._decision(space, structure, choice.theta, how, choice.scores)
            )
            cost = structures.num_block_runs - before
        return Selected(
            decision, cost, None if simple is None else space.kept_blocks(simple), history, rounds
        )

    def _simple_rule(self, problem: Problem) -> Tensor:
        return ShortGPT()(problem).structure

    def _cheap(self, problem: Problem) -> list[Tensor]:
        """The choices of criteria that cost little."""
        found = [
            each(problem).structure
            for each in (ShortGPT(), FluxLite(), Sensitivity(measure="distance"))
        ]
        for rule in (First(), Uniform()):
            with suppress(ValueError):  # that has no structure for this budget
                found.append(rule.check(problem.space))
        return found

    def _decision(
        self,
        space: Space,
        structure: Tensor,
        theta: Tensor,
        how: str | None = None,
        scores: Tensor | None = None,
    ) -> Decision:
        """The decision where a distribution was learned: probabilities are its marginals."""
        each = distributions(space, theta)
        top = sum(float(d.log_prob(d.most_probable(1))) for d in each)
        return space.decision(
            structure,
            criterion=how or self.criterion.name,
            scores=scores,
            probabilities=marginals(space, theta),
            confidence=math.exp(top),
            entropy=sum(d.entropy() for d in each),
        )


def select_blocks(
    model: nn.Module,
    draw: Callable[[int], Calibration],
    *,
    criterion: Criterion | str = "global",
    seed: int = 0,
    **options: Any,
) -> Decision:
    """Choose which blocks of `model` stay.

    Then ``remove_blocks(model, decision.kept_blocks)`` cuts it.

    Args:
        model: The dense, trained model; left as it is.
        draw: Makes a `Calibration` of so many samples, e.g. ``lambda n: Calibration.of(objective,
            *batch(n))``.
        criterion: See `Selection`.
        **options: See `Selection`.
        seed: Of all randomness.

    Example::

        decision = select_blocks(model, draw, keep=6, candidates=8, trial_steps=[10, 20, 30])
    """
    return Selection(criterion, **options)(model, draw, seed=seed).decision
