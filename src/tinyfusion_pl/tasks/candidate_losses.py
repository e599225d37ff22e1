"""The calibration losses of all structures, or of many of them, with the choices of criteria marked (TinyFusion, figure 5)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import nn

from tinyfusion_pl.artifacts import write_json, write_text
from tinyfusion_pl.models import load_decision
from tinyfusion_pl.models.records import RECORD
from tinyfusion_pl.report import write_candidate_losses
from tinyfusion_pl.selection import CRITERIA, Problem, Selection
from tinyfusion_pl.selection.candidates import get_candidates, num_structures
from tinyfusion_pl.selection.criteria.sensitivity import check_measure
from tinyfusion_pl.selection.problem import CANDIDATES
from tinyfusion_pl.selection.structures import open_structures
from tinyfusion_pl.tasks.choosing import Draws
from tinyfusion_pl.tasks.folder import say

LOSSES, RESULT, FIGURE = "candidate_losses.csv", "candidate_losses.json", "candidate_losses.png"


@dataclass(kw_only=True)
class CandidateLosses:
    """What is scored, and what is marked.

    Args:
        num_candidates: Structures that are scored, >= 1: all where there are no more, else so many drawn at random.
        measure: ``"loss"`` of the objective, or ``"distance"`` to the teacher's output.
        criteria: Names of criteria whose choices are marked (`CRITERIA`).
        chosen: Name -> run folder or shallow folder, whose choices are marked too.
    """

    num_candidates: int = 100_000
    measure: str = "loss"
    criteria: Sequence[str] = ()
    chosen: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if self.num_candidates < 1:
            raise ValueError(f"num_candidates is {self.num_candidates}; give 1 or more.")
        check_measure(self.measure)
        if unknown := [name for name in self.criteria if name not in CRITERIA]:
            raise ValueError(
                f"criteria names {unknown}; available criteria: {', '.join(CRITERIA)}."
            )


def score_candidates(
    *,
    run_dir: str | Path,
    name: str,
    seed: int,
    teacher: nn.Module,
    objective: Any,
    data: LightningDataModule,
    pruning: Callable[..., Selection],
    candidates: CandidateLosses,
    begin: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Score the structures that the budget of `pruning` allows, and mark choices among them.

    Leaves ``candidate_losses.csv`` (a line for each structure), ``candidate_losses.json`` (the marked choices: kept blocks, loss, share of
    the structures that lose less) and ``candidate_losses.png``. `begin` is called when all checks have passed.

    Raises:
        ValueError: for a budget that does not fit the teacher, or a choice that does not fit the budget.
    """
    selection, folder, start = pruning(), Path(run_dir), time.perf_counter()
    if not isinstance(selection, Selection):
        raise ValueError(
            "Candidates are those of a budget, which pruning=learned states by groups. Give pruning=index and pruning.keep or "
            "pruning.pattern."
        )
    space = selection.space(teacher)
    data.check_fits(teacher)
    objective.check_fits(teacher)
    chosen = {mark: _chosen(mark, path, space) for mark, path in (candidates.chosen or {}).items()}
    if begin is not None:
        begin()
    say(
        f"{name}: {num_structures(space):,} structures; {min(num_structures(space), candidates.num_candidates):,} are scored"
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
            except ValueError as error:  # a rule that has no structure for this budget
                say(f"{criterion}: {error}")
        marked = (
            structures.means(problem.fixed, torch.stack(list(chosen.values())), candidates.measure)
            if chosen
            else torch.empty(0)
        )
    marks = {
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
            f"{each['loss']:.5g}  {mark}: {each['kept_blocks']}, {100 * each['share_below']:.2g}% of the structures lose less"
        )
    say(
        f"Done, for {cost:,} runs of a block on a sample ({one_by_one / max(cost, 1):.1f}x fewer than one by one). Open {figure}"
    )
    return result


def _units(space: Any) -> list[Sequence[int]]:
    return [unit for path in space.paths for unit in space.units[path]]


def _chosen(mark: str, path: str, space: Any) -> torch.Tensor:
    """The choice in a run or shallow folder, as a structure of `space`."""
    folder = Path(path) / "shallow" if (Path(path) / "shallow" / RECORD).exists() else Path(path)
    kept = load_decision(folder).kept_blocks
    units = [
        space.members(p).start + i
        for p in space.paths
        for i, unit in enumerate(space.units[p])
        if set(unit) <= set(kept.get(p, ()))
    ]
    return space.check(units, what=f"chosen.{mark}")
