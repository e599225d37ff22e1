"""How a group's gate logits become masks (TinyFusion, section 3.2, equations 5-6).

A `MaskDistribution` is the one seam between logits and masks: only it knows which outcomes there
are. `CandidateDistribution` enumerates the ways to keep N of M and draws them by a hard
straight-through Gumbel-softmax; another choice is another class (see `StackGates`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from tinyfusion_pl.pruning.patterns import Group


@dataclass(frozen=True)
class Certainty:
    """How decided a distribution is.

    Attributes:
        confidence: Probability of the most probable outcome, in (0, 1].
        entropy: Entropy in nats, >= 0.
        probabilities: Probability of each outcome; None where outcomes are too many to list.
    """

    confidence: float
    entropy: float
    probabilities: list[float] | None


class MaskDistribution(Protocol):
    """What gates need of a distribution over the masks of a group.

    A distribution whose number of kept members is not fixed holds it to the budget by a penalty: it
    has ``penalty(logits)``, a scalar whose gradient is added to that of the loss when the logits
    step, ``ascend(logits)``, called then, and its state in the buffer ``multipliers``
    (`HardConcreteDistribution`).
    """

    num_logits: int
    num_members: int

    def noise(self, num_samples: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Noise (num_samples, K) of the kind that `sample` takes, float32 on CPU."""

    def sample(self, logits: Tensor, tau: float, noise: Tensor) -> Tensor:
        """Masks (num_samples, num_members) of exact zeros and ones, differentiable in `logits`."""

    def member_probabilities(self, logits: Tensor) -> Tensor:
        """Probability that each member stays (num_members,)."""

    def decide(self, logits: Tensor) -> list[int]:
        """The members (0-based in the group, ascending) of the most probable outcome."""

    def certainty(self, logits: Tensor) -> Certainty:
        """Confidence and entropy at `logits`."""


class CandidateDistribution(nn.Module):
    """One logit for each way of keeping N of M; probability = softmax(scaling * logits).

    Args:
        group: The group whose candidates are enumerated.
        fixed: Units of the stack that always stay.
        scaling: Factor on the logits, > 0 (published: 100).
        straight_through: Which members of a sample's mask have the gradient of the soft choice:
            ``"all"`` (published), or ``"kept"``, those that it keeps, hard + (soft - soft.detach())
            * hard. At a member that was dropped the straight-through gradient extrapolates, and may
            have the wrong sign.
    """

    def __init__(
        self,
        group: Group,
        *,
        scaling: float = 100.0,
        fixed: Collection[int] = (),
        straight_through: str = "all",
    ) -> None:
        super().__init__()
        self.straight_through = check_straight_through(straight_through)
        if not scaling > 0:
            raise ValueError(f"scaling is {scaling}; give a number > 0 (published: 100).")
        self.scaling = float(scaling)
        self.register_buffer("candidates", group.candidates(fixed=fixed), persistent=False)

    @property
    def num_logits(self) -> int:
        return self.candidates.shape[0]

    @property
    def num_members(self) -> int:
        return self.candidates.shape[1]

    def noise(self, num_samples: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Gumbel noise (num_samples, num_logits)."""
        exponential = torch.empty(num_samples, self.num_logits, dtype=torch.float32).exponential_(
            generator=generator
        )
        return -exponential.log()

    def sample(self, logits: Tensor, tau: float, noise: Tensor) -> Tensor:
        soft = ((self.scaling * logits + noise) / tau).softmax(-1)  # (N, C)
        hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
        if self.straight_through == "kept":
            soft, hard = soft @ self.candidates, hard @ self.candidates  # (N, M)
            return hard + (soft - soft.detach()) * hard
        # In this order the value is exactly 0 or 1: soft - soft is zero, while hard - soft + soft
        # rounds.
        return (hard + (soft - soft.detach())) @ self.candidates  # (N, M)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Probability of each candidate (num_logits,)."""
        return (self.scaling * logits).softmax(-1)

    def member_probabilities(self, logits: Tensor) -> Tensor:
        return self.probabilities(logits) @ self.candidates

    def decide(self, logits: Tensor) -> list[int]:
        return self.candidates[logits.argmax()].nonzero().flatten().tolist()

    def certainty(self, logits: Tensor) -> Certainty:
        p = self.probabilities(logits).double().cpu()
        entropy = -(p * p.clamp_min(1e-300).log()).sum().item()
        return Certainty(p.max().item(), max(entropy, 0.0), p.tolist())


def check_straight_through(straight_through: str) -> str:
    """`ValueError` for another word."""
    if straight_through not in ("all", "kept"):
        raise ValueError(
            f"straight_through is {straight_through!r}; give 'all' (published) or 'kept' (gradients "
            "of the members that a sample keeps)."
        )
    return straight_through
