"""How a group's gate logits become masks: hard straight-through Gumbel-softmax over candidates (TinyFusion, section 3.2, equations 5-6).

A sampler is the one seam between logits and masks: another choice (a learned k-of-n over a whole stack, say) is another class.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from tinyfusion_pl.pruning.patterns import Group


class MaskSampler(Protocol):
    """What gates need of a sampler: logits, tau and noise in; mask and probabilities out."""

    num_logits: int
    num_members: int

    def noise(self, num_samples: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Noise (num_samples, num_logits) of the kind that `sample` takes, float32 on CPU."""

    def sample(self, logits: Tensor, tau: float, noise: Tensor) -> Tensor:
        """Hard masks (num_samples, num_members) of exact zeros and ones, with the soft gradient into `logits` (num_logits,)."""

    def probabilities(self, logits: Tensor) -> Tensor:
        """Probability of each outcome (num_logits,), summing to one."""

    def member_probabilities(self, logits: Tensor) -> Tensor:
        """Probability that each member stays (num_members,)."""

    def decide(self, logits: Tensor) -> list[int]:
        """The members (0-based in the group, ascending) of the most probable outcome."""


class CandidateSampler(nn.Module):
    """One logit for each way of keeping N of M; probability = softmax(scaling * logits).

    Args:
        group: The group whose candidates are enumerated.
        scaling: Factor on the logits, > 0 (published: 100).
    """

    def __init__(self, group: Group, *, scaling: float = 100.0) -> None:
        super().__init__()
        if not scaling > 0:
            raise ValueError(f"scaling is {scaling}; give a number > 0 (published: 100).")
        self.scaling = float(scaling)
        self.register_buffer("candidates", group.candidates(), persistent=False)

    @property
    def num_logits(self) -> int:
        return self.candidates.shape[0]

    @property
    def num_members(self) -> int:
        return self.candidates.shape[1]

    def noise(self, num_samples: int, *, generator: torch.Generator | None = None) -> Tensor:
        return -torch.empty(num_samples, self.num_logits).exponential_(generator=generator).log()

    def sample(self, logits: Tensor, tau: float, noise: Tensor) -> Tensor:
        soft = ((self.scaling * logits + noise) / tau).softmax(-1)  # (N, C)
        hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
        # In this order the value is exactly 0 or 1: soft - soft is zero, while hard - soft + soft rounds.
        return (hard + (soft - soft.detach())) @ self.candidates  # (N, M)

    def probabilities(self, logits: Tensor) -> Tensor:
        return (self.scaling * logits).softmax(-1)

    def member_probabilities(self, logits: Tensor) -> Tensor:
        return self.probabilities(logits) @ self.candidates

    def decide(self, logits: Tensor) -> list[int]:
        return self.candidates[logits.argmax()].nonzero().flatten().tolist()
