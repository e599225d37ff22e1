"""Hard concrete gates: one logit for each unit, their expected number held to the budget by multipliers.

The gate's distribution is that of Louizos et al. 2018 (arXiv 1712.01312, section 2.2), the
constraint that of Wang et al. 2020 (arXiv 1910.04732, section 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor, nn

from tinyfusion_pl.pruning.distributions import Certainty, check_straight_through
from tinyfusion_pl.pruning.patterns import Group
from tinyfusion_pl.pruning.subsets import SubsetDistribution

TEMPERATURE = 2 / 3
"""beta of the concrete distribution (published)."""
STRETCH = (-0.1, 1.1)
"""gamma and zeta, between which it is stretched (published)."""


class HardConcreteDistribution(nn.Module):
    """A gate of its own for each unit; nothing is enumerated, so a group may be as large as a stack.

    With u uniform in (0, 1) and log_alpha = scaling * logit, a gate is

        z = clamp(sigmoid((log u - log(1 - u) + log_alpha) / beta) * (zeta - gamma) + gamma, 0, 1)

    In the paper z itself multiplies what it gates. Here a mask is exactly 0 or 1, because blocks
    that a sample drops are not run for it: the mask is 1 where z > 1/2, and has the gradient of z
    (straight-through), which is 0 where z is clamped. So a unit is kept with probability P(z > 1/2)
    = sigmoid(log_alpha), where the paper's P(z > 0) = sigmoid(log_alpha - beta * log(-gamma /
    zeta)) is that of a gate which lets anything through. The decision keeps the units of the k
    largest logits, whatever their expected number is.

    E, the expected number of units that a mask keeps, is held to the k units that are to stay by
    the penalty lambda_1 * (E - k) + lambda_2 * (E - k)^2. Its gradient is added to that of the loss
    when the logits step (`GateOptimizer`), and the multipliers, 0 at first, ascend: lambda_1 by
    multiplier_lr * (E - k), lambda_2 by multiplier_lr * (E - k)^2. Wang et al. constrain the share
    of the parameters; units are alike, so here it is their number.

    Args:
        group: The group whose units are gated.
        fixed: Units of the stack that always stay.
        scaling: Factor on the logits, > 0.
        straight_through: ``"all"``, or ``"kept"``: see `CandidateDistribution`.
        multiplier_lr: Step size of the multipliers, > 0.

    Attributes:
        multipliers: lambda_1 and lambda_2 (2,).
    """

    def __init__(
        self,
        group: Group,
        *,
        scaling: float = 100.0,
        fixed: Collection[int] = (),
        straight_through: str = "all",
        multiplier_lr: float = 1e-2,
    ) -> None:
        super().__init__()
        self.straight_through = check_straight_through(straight_through)
        for name, value in (("scaling", scaling), ("multiplier_lr", multiplier_lr)):
            if not value > 0:
                raise ValueError(f"{name} is {value}; give a number > 0.")
        self.num_kept, self.scaling, self.multiplier_lr = (
            group.num_kept,
            float(scaling),
            float(multiplier_lr),
        )
        always = torch.zeros(group.num_blocks, dtype=torch.bool)
        always[group.always(fixed)] = True
        self.register_buffer("fixed", always, persistent=False)
        self.register_buffer("multipliers", torch.zeros(2), persistent=False)

    @property
    def num_logits(self) -> int:
        return len(self.fixed)

    @property
    def num_members(self) -> int:
        return len(self.fixed)

    def noise(self, num_samples: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Logistic noise (num_samples, num_logits)."""
        u = torch.empty(num_samples, self.num_logits, dtype=torch.float32)
        u = u.uniform_(generator=generator).clamp(1e-7, 1 - 1e-7)
        return u.log() - (-u).log1p()

    def sample(self, logits: Tensor, tau: float, noise: Tensor) -> Tensor:
        """Masks (num_samples, num_members); `tau` is not used, beta is fixed."""
        gamma, zeta = STRETCH
        concrete = ((noise + self.scaling * logits) / TEMPERATURE).sigmoid()  # (N, M)
        stretched = concrete * (zeta - gamma) + gamma
        hard, soft = (stretched > 0.5).to(concrete.dtype), stretched.clamp(0, 1)
        gradient = soft - soft.detach()  # exactly 0
        mask = hard + (gradient * hard if self.straight_through == "kept" else gradient)
        return torch.where(self.fixed, torch.ones_like(mask), mask)

    def member_probabilities(self, logits: Tensor) -> Tensor:
        """P(z > 1/2) of each unit (num_members,), 1 for fixed ones; the sum is E, which may be unlike k."""
        probabilities = (self.scaling * logits).sigmoid()
        return torch.where(self.fixed, torch.ones_like(probabilities), probabilities)

    def penalty(self, logits: Tensor) -> Tensor:
        """lambda_1 * (E - k) + lambda_2 * (E - k)^2, a scalar, differentiable in `logits`."""
        excess = self.member_probabilities(logits).sum() - self.num_kept
        return self.multipliers[0] * excess + self.multipliers[1] * excess.square()

    @torch.no_grad()
    def ascend(self, logits: Tensor) -> None:
        """One step of gradient ascent of the multipliers."""
        excess = self.member_probabilities(logits).sum() - self.num_kept
        self.multipliers += self.multiplier_lr * torch.stack([excess, excess.square()])

    def decide(self, logits: Tensor) -> list[int]:
        values = logits.detach().double().cpu().masked_fill(self.fixed.cpu(), math.inf)
        return sorted(values.sort(descending=True, stable=True).indices[: self.num_kept].tolist())

    def certainty(self, logits: Tensor) -> Certainty:
        """Of the subsets of k units, drawn by these gates where they keep exactly k."""
        free = ~self.fixed.cpu()
        theta = self.scaling * logits.detach().double().cpu()[free]  # log-odds
        subsets = SubsetDistribution(theta, self.num_kept - int((~free).sum()))
        top = float(subsets.log_prob(subsets.most_probable(1)))
        return Certainty(min(math.exp(top), 1.0), subsets.entropy(), None)
