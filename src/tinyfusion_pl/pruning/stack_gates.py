"""The gate logits of one stack of blocks, their average, and the decision they stand for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion_pl.pruning.blocks import check_units, single_units
from tinyfusion_pl.pruning.decision import GroupDecision, StackDecision
from tinyfusion_pl.pruning.distributions import CandidateDistribution, MaskDistribution
from tinyfusion_pl.pruning.patterns import Pattern

DistributionFactory = Callable[..., MaskDistribution]
"""Called with a `Group` and ``fixed=``, the units of the stack that always stay."""


class StackGates(nn.Module):
    """The gate logits of one stack.

    Args:
        path: Path of the stack in the model, the key in decisions and records.
        num_blocks: Blocks in the stack.
        pattern: What share of the stack's units stays.
        units: Blocks that only go together; default: each block on its own.
        scaling: Factor on logits in the softmax, > 0 (published: 100).
        init: Initial value of every logit (published: 0.02).
        average_decay: Decay of the exponential average of the logits that decides, in [0, 1)
            (published: 0.999).
        index: Place of this stack among those of its model.
        distribution: Makes the `MaskDistribution` of a group, from the `Group` and ``fixed=``;
            default: `CandidateDistribution`.
        fixed: Blocks that always stay, with their units.
    """

    def __init__(
        self,
        path: str,
        num_blocks: int,
        pattern: str | Pattern,
        *,
        units: Sequence[Sequence[int]] | None = None,
        scaling: float = 100.0,
        init: float = 0.02,
        average_decay: float = 0.999,
        index: int = 0,
        distribution: DistributionFactory | None = None,
        fixed: Collection[int] = (),
    ) -> None:
        super().__init__()
        if not 0 <= average_decay < 1:
            raise ValueError(
                f"average_decay is {average_decay}; give a number in [0, 1) (published: 0.999)."
            )
        self.path, self.num_blocks, self.index, self.average_decay = (
            path,
            num_blocks,
            index,
            average_decay,
        )
        self.pattern = Pattern.parse(pattern, enumerated=distribution is None)
        self.units = (
            single_units(num_blocks) if units is None else check_units(units, num_blocks, path)
        )
        self.groups = self.pattern.groups(len(self.units))
        make = distribution or partial(CandidateDistribution, scaling=scaling)
        always = frozenset(n for n, unit in enumerate(self.units) if set(unit) & set(fixed))
        self.distributions = nn.ModuleList(make(group, fixed=always) for group in self.groups)
        for i, each in enumerate(self.distributions):
            self.register_parameter(
                f"logits_{i}",
                nn.Parameter(torch.full((each.num_logits,), float(init), dtype=torch.float32)),
            )
            self.register_buffer(
                f"average_{i}",
                torch.full((each.num_logits,), float(init), dtype=torch.float32),
                persistent=False,
            )

    @property
    def logits(self) -> list[nn.Parameter]:
        """The gate logits, one (num_logits,) a group."""
        return [getattr(self, f"logits_{i}") for i in range(len(self.groups))]

    @property
    def averages(self) -> list[Tensor]:
        """The exponential averages of the logits, one (num_logits,) a group."""
        return [getattr(self, f"average_{i}") for i in range(len(self.groups))]

    @property
    def multipliers(self) -> list[Tensor]:
        """Those of the distributions that have a penalty."""
        return [d.multipliers for d in self.distributions if hasattr(d, "multipliers")]

    @property
    def device(self) -> torch.device:
        return self.logits_0.device

    def get_group(self, unit: int) -> int:
        """The place of the group that the unit belongs to."""
        return next(i for i, group in enumerate(self.groups) if unit in group.members)

    def sample(self, group: int, tau: float, noise: Tensor) -> Tensor:
        """Masks (N, num_members) of one group, differentiable in its logits."""
        return self.distributions[group].sample(self.logits[group], tau, noise)

    @torch.no_grad()
    def update_average(self) -> None:
        """One step of the exponential average; call after each change of the logits."""
        for average, logits in zip(self.averages, self.logits):
            average.lerp_(logits, 1 - self.average_decay)

    def add_penalties(self) -> None:
        """Add the gradients of the distributions' penalties to the logits', and step their multipliers."""
        for logits, distribution in zip(self.logits, self.distributions):
            if hasattr(distribution, "penalty"):
                with torch.enable_grad():
                    (grad,) = torch.autograd.grad(distribution.penalty(logits), logits)
                logits.grad = grad if logits.grad is None else logits.grad + grad
                distribution.ascend(logits)

    def state(self) -> dict[str, Any]:
        """Logits, averages and multipliers, on CPU, for a checkpoint."""
        return {
            "pattern": str(self.pattern),
            "distribution": type(self.distributions[0]).__name__,
            "logits": [x.detach().cpu().clone() for x in self.logits],
            "averages": [x.cpu().clone() for x in self.averages],
            "multipliers": [x.cpu().clone() for x in self.multipliers],
        }

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave.

        Raises:
            ValueError: for the logits of another distribution.
        """
        mine = type(self.distributions[0]).__name__
        if (theirs := state.get("distribution", mine)) != mine:
            raise ValueError(
                f"The checkpoint's gates of '{self.path}' are logits of a {theirs}, these of a {mine}; "
                "resume with the relaxation it was made with."
            )
        own = [*self.logits, *self.averages, *self.multipliers]
        for mine, stored in zip(
            own, [*state["logits"], *state["averages"], *state.get("multipliers", [])]
        ):
            mine.copy_(stored)

    def kept_units(self) -> list[int]:
        """The units of the most probable outcomes by the averaged logits."""
        each = zip(self.groups, self.distributions, self.averages)
        return [group.start + i for group, d, average in each for i in d.decide(average)]

    def get_blocks(self, kept_units: Sequence[int]) -> list[int]:
        """The blocks that stay when exactly these units do: theirs, and those in no unit."""
        dropped = {i for n, unit in enumerate(self.units) if n not in set(kept_units) for i in unit}
        return [i for i in range(self.num_blocks) if i not in dropped]

    @torch.no_grad()
    def decide(self) -> StackDecision:
        """The decision (by the averaged logits) with the current probabilities."""
        kept, groups, unit_probabilities = set(self.kept_units()), [], []
        for group, distribution, logits in zip(self.groups, self.distributions, self.logits):
            unit_probabilities += distribution.member_probabilities(logits).tolist()
            certainty = distribution.certainty(logits)
            groups.append(
                GroupDecision(
                    group.start,
                    group.num_kept,
                    group.num_blocks,
                    [i for i in group.members if i in kept],
                    confidence=certainty.confidence,
                    entropy=certainty.entropy,
                    probabilities=certainty.probabilities,
                )
            )
        unit_of = {index: unit for unit, indices in enumerate(self.units) for index in indices}
        block_probabilities = [
            unit_probabilities[unit_of[i]] if i in unit_of else 1.0 for i in range(self.num_blocks)
        ]
        units = [list(unit) for unit in self.units]
        return StackDecision(
            str(self.pattern),
            self.num_blocks,
            self.get_blocks(sorted(kept)),
            block_probabilities,
            groups,
            units=units,
        )

    def _apply(self, fn, recurse: bool = True):
        """Moves with the model to another device, but stays in float32 where it becomes half precision."""
        return super()._apply(lambda t: t.to(fn(t.new_empty(0)).device), recurse)

    # A model that carries gates saves and loads with the keys it had before: see
    # DepthGates.gate_state.
    def _save_to_state_dict(self, *args, **kwargs) -> None:
        pass

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        pass
