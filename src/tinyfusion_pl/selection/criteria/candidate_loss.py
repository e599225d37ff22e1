"""The structure of minimum, median or maximum calibration loss.

TinyFusion, table 3 and figure 5.
"""

from __future__ import annotations

from tinyfusion_pl.selection.candidates import get_candidates
from tinyfusion_pl.selection.criteria.sensitivity import check_measure
from tinyfusion_pl.selection.problem import CANDIDATES, Choice, Problem


class CandidateLoss:
    """Scores all structures of the space, or a sample of them, and takes one by its rank.

    Args:
        rank: ``"min"``, ``"median"`` or ``"max"``.
        num_candidates: Structures that are scored, drawn at random where there are more.
        measure: ``"loss"`` of the objective, or ``"distance"`` to the dense model's output.
    """

    def __init__(
        self, rank: str = "min", *, num_candidates: int = 10_000, measure: str = "loss"
    ) -> None:
        if rank not in ("min", "median", "max"):
            raise ValueError(f"rank is {rank!r}; give 'min', 'median' or 'max'.")
        if num_candidates < 1:
            raise ValueError(f"num_candidates is {num_candidates}; give 1 or more.")
        self.rank, self.num_candidates, self.measure = rank, num_candidates, check_measure(measure)
        self.name = f"{rank}_loss"

    def __call__(self, problem: Problem) -> Choice:
        """Choose the units that stay."""
        structures = get_candidates(
            problem.space, self.num_candidates, problem.generator(CANDIDATES)
        )
        order = problem.structures.means(problem.fixed, structures, self.measure).argsort()
        at = {"min": 0, "median": (len(order) - 1) // 2, "max": len(order) - 1}[self.rank]
        ranked = structures[order] if self.rank == "min" else None
        return Choice(structures[order[at]], considered=ranked)
