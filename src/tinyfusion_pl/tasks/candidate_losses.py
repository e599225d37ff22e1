"""Calibration losses of the structures of a budget, with criteria marked (TinyFusion, figure 5)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tinyfusion_pl.artifacts import write_json, write_text
from tinyfusion_pl.data import GenerationDataModule
from tinyfusion_pl.models import load_decision
from tinyfusion_pl.models.records import RECORD
from tinyfusion_pl.objectives.base import Objective
from tinyfusion_pl.report import write_candidate_losses
from tinyfusion_pl.selection import CRITERIA, Problem, Selection
from tinyfusion_pl.selection.candidates import get_candidates, num_structures
from tinyfusion_pl.selection.criteria.sensitivity import check_measure
from tinyfusion_pl.selection.problem import CANDIDATES
from tinyfusion_pl.selection.structures import open_structures
from tinyfusion_pl.tasks.choosing import Draws, describe_kept
from tinyfusion_pl.tasks.folder import say

LOSSES, RESULT, FIGURE = "candidate_losses.csv", "candidate_losses.json", "candidate_losses.png"


@dataclass(kw_only=True)
class CandidateLosses:
    """The structures to score, and the selections to mark.

    Args:
        num_candidates: Structures to score, >= 1: all of them, or a random subset of this size.
        measure: ``"loss"`` of the objective, or ``"distance"`` to the teacher's output.
        criteria: Names of criteria (`CRITERIA`) whose selections are marked.
        chosen: Name -> run folder or shallow folder whose selection is marked.
    """

    num_candidates: int = 100_000
    measure: str = "loss"
    criteria: Sequence[str] = ()
    chosen: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if self.num_candidates < 1:
            raise ValueError(f"num_candidates is {self.num_candidates}; give a count >= 1.")
        check_measure(self.measure)
        if unknown := [name for name in self.criteria if name not in CRITERIA]:
            raise ValueError(
                f"Unknown criteria {unknown}; available criteria: {', '.join(CRITERIA)}."
            )


def score_candidates(
    *,
    run_dir: str | Path,
    name: str,
    seed: int,
    teacher: nn.Module,
    objective: Objective,
    data: GenerationDataModule,
    pruning: Callable[..., Selection],
    candidates: CandidateLosses,
    begin: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Score the structures that the budget of `pruning` allows, and mark selections among them.

    Writes ``candidate_losses.csv`` (a line for each structure), ``candidate_losses.json`` (the
    marked
    selections: kept blocks, loss, share of structures with a smaller loss) and
    ``candidate_losses.png``. `begin` is called once all checks have passed.

    Raises:
        ValueError: for a budget that does not fit the teacher, or a selection that does not fit the
            budget.
    """
    selection, folder, start = pruning(), Path(run_dir), time.perf_counter()
    if not isinstance(selection, Selection):
        raise ValueError(
            "Candidates need a budget over all blocks, but pruning=learned has one for each group. "
            "Give pruning=index and pruning.keep or pruning.pattern."
        )
    space = selection.space(teacher)
    data.check_fits(teacher)
    objective.check_fits(teacher)
    chosen = {mark: _chosen(mark, path, space) for mark, path in (candidates.chosen or {}).items()}
    if begin is not None:
        begin()
    say(
        f"{name}: scoring {min(num_structures(space), candidates.num_candidates):,} of "
        f"{num_structures(space):,} structures"
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = teacher.to(device).eval()
    with (
        torch.random.fork_rng(),
        open_structures(model, space, max_rows=selection.max_rows) as structures,
    ):
        problem = Problem(
            structures, Draws(data, objective, device), num_samples=selection.num_samples, seed=seed
        )
        structures.ask(problem.fixed)
        rows = get_candidates(space, candidates.num_candidates, problem.generator(CANDIDATES))
        before = structures.num_block_runs
        losses = structures.means(problem.fixed, rows, candidates.measure)
        cost = structures.num_block_runs - before
        for criterion in candidates.criteria:
            try:
                chosen[criterion] = CRITERIA[criterion]()(problem).structure
            except ValueError as error:  # the criterion does not support this budget
                say(f"{criterion}: {error}")
        marked = (
            structures.means(problem.fixed, torch.stack(list(chosen.values())), candidates.measure)
            if chosen
            else torch.empty(0)
        )
    marks: dict[str, dict[str, Any]] = {
        mark: {
            "kept_blocks": space.kept_blocks(structure),
            "loss": float(loss),
            "share_below": float((losses < loss).double().mean()),
        }
        for (mark, structure), loss in zip(chosen.items(), marked)
    }
    one_by_one = (
        len(rows)
        * int(sum(len(unit) * int(keep) for unit, keep in zip(_units(space), rows[0])))
        * problem.fixed.num_samples
    )
    result = {
        "num_structures": num_structures(space),
        "num_scored": len(rows),
        "measure": candidates.measure,
        "marks": marks,
        "num_block_runs": cost,
        "one_by_one": one_by_one,
        "seconds": time.perf_counter() - start,
    }
    write_json(folder / RESULT, result)
    lines = [
        "loss,kept_units",
        *(
            f"{loss!r},{' '.join(map(str, row.nonzero().flatten().tolist()))}"
            for loss, row in zip(losses.tolist(), rows)
        ),
    ]
    write_text(folder / LOSSES, "\n".join(lines) + "\n")
    figure = write_candidate_losses(
        folder / FIGURE,
        np.asarray(losses),
        {mark: each["loss"] for mark, each in marks.items()},
        measure=candidates.measure,
    )
    for mark, each in sorted(marks.items(), key=lambda item: item[1]["loss"]):
        say(
            f"{each['loss']:.5g}  {mark}: {describe_kept(each['kept_blocks'])}; "
            f"{100 * each['share_below']:.2g}% of the structures have a smaller loss"
        )
    say(
        f"Done: {cost:,} block evaluations ({one_by_one / max(cost, 1):.1f}x fewer than one by "
        f"one). Open {figure}"
    )
    return result


def _units(space: Any) -> list[Sequence[int]]:
    return [unit for path in space.paths for unit in space.units[path]]


def _chosen(mark: str, path: str, space: Any) -> torch.Tensor:
    """The selection in a run or shallow folder, as a structure of `space`."""
    folder = Path(path) / "shallow" if (Path(path) / "shallow" / RECORD).exists() else Path(path)
    kept = load_decision(folder).kept_blocks
    units = [
        space.members(p).start + i
        for p in space.paths
        for i, unit in enumerate(space.units[p])
        if set(unit) <= set(kept.get(p, ()))
    ]
    return space.check(units, what=f"chosen.{mark}")
