"""Which relaxation of the masks is learned, by name, and what belongs to each."""

from __future__ import annotations

from functools import partial
from typing import Any

from tinyfusion_pl.pruning.distributions import CandidateDistribution, check_straight_through
from tinyfusion_pl.pruning.hard_concrete import TEMPERATURE, HardConcreteDistribution
from tinyfusion_pl.pruning.stack_gates import DistributionFactory

RELAXATIONS = ("gumbel", "hard_concrete")
TAUS = (4.0, 0.1)
"""Temperature of the Gumbel-softmax at the first and the last step (published)."""


class Relaxation:
    """What is drawn for a group, and how a gradient reaches its logits.

    Args:
        name: ``"gumbel"``: a hard Gumbel-softmax over the candidates of each group (published);
            ``"hard_concrete"``: a gate for each unit (see `HardConcreteDistribution`).
        straight_through: See `CandidateDistribution`.
        multiplier_lr: Step size of the multipliers of ``"hard_concrete"``, > 0.

    Raises:
        ValueError: for another name, and numbers out of range.
    """

    def __init__(
        self, name: str = "gumbel", *, straight_through: str = "all", multiplier_lr: float = 1e-2
    ) -> None:
        if name not in RELAXATIONS:
            raise ValueError(f"relaxation is {name!r}; give {' or '.join(map(repr, RELAXATIONS))}.")
        check_straight_through(straight_through)
        if isinstance(multiplier_lr, bool) or not 0 < multiplier_lr < float("inf"):
            raise ValueError(f"multiplier_lr is {multiplier_lr}; give a number > 0.")
        self.name, self.straight_through = name, straight_through
        self.multiplier_lr = multiplier_lr

    @property
    def enumerates(self) -> bool:
        """Whether the candidates of a group are listed, so that they must not be too many."""
        return self.name == "gumbel"

    def factory(self, *, scaling: float) -> DistributionFactory:
        """Makes the `MaskDistribution` of a group."""
        options = {"scaling": scaling, "straight_through": self.straight_through}
        if self.enumerates:
            return partial(CandidateDistribution, **options)
        return partial(HardConcreteDistribution, **options, multiplier_lr=self.multiplier_lr)

    def taus(self, start: float, end: float, anneal_steps: int | None) -> tuple[float, float]:
        """The temperature at the first and the last step.

        Raises:
            ValueError: for settings of the annealing where the temperature is fixed.
        """
        if self.enumerates:
            return start, end
        given = {"tau_start": (start, TAUS[0]), "tau_end": (end, TAUS[1])}
        given["anneal_steps"] = (anneal_steps, None)
        for name, (value, default) in given.items():
            if value != default:
                raise ValueError(
                    f"{name} is {value}, but hard concrete gates have a fixed temperature of "
                    f"2/3 (arXiv 1712.01312). Leave {name} at its default, {default}."
                )
        return TEMPERATURE, TEMPERATURE

    def configuration(self) -> dict[str, Any]:
        """The settings, for a record."""
        of_name = {} if self.enumerates else {"multiplier_lr": self.multiplier_lr}
        return {"relaxation": self.name, "straight_through": self.straight_through, **of_name}
