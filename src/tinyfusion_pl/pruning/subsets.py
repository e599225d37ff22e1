"""A distribution over the k-subsets of n units, without listing them: p(S) proportional to exp(sum of theta_i over S), |S| = k.

Normalization, sampling, marginals and the most probable subsets are computed by dynamic programming
over the units in log space, in O(nk): 19 of 57 costs no more than 1 of 2.
"""

from __future__ import annotations

import heapq
import itertools

import torch
from torch import Tensor

NEVER = float("-inf")


class SubsetDistribution:
    """Subsets of exactly `num_kept` of the units that `theta` scores.

    Args:
        theta: (n,) log-odds of the units, any floating dtype; computed in float64.
        num_kept: k, in [0, n].

    Raises:
        ValueError: for k out of range, or a theta that is not finite.
    """

    def __init__(self, theta: Tensor, num_kept: int) -> None:
        if theta.ndim != 1 or not torch.isfinite(theta).all():
            raise ValueError(
                f"theta must be a vector of finite numbers, got shape {tuple(theta.shape)}."
            )
        if not 0 <= num_kept <= len(theta):
            raise ValueError(
                f"num_kept is {num_kept}; give a count from 0 to {len(theta)}, the number of units."
            )
        self.theta, self.num_kept = theta.detach().double().cpu(), num_kept
        self._after = self._suffix_table()

    def _suffix_table(self) -> Tensor:
        """B[i, j]: log of the summed weights of all j-subsets of the units from i on. (n + 1, k + 1)"""
        n, k = len(self.theta), self.num_kept
        table = torch.full((n + 1, k + 1), NEVER, dtype=torch.float64)
        table[n, 0] = 0.0
        for i in range(n - 1, -1, -1):
            table[i] = table[i + 1]
            table[i, 1:] = torch.logaddexp(table[i + 1, 1:], self.theta[i] + table[i + 1, :-1])
        return table

    def _prefix_table(self) -> Tensor:
        """F[i, j]: the same of the units before i. (n + 1, k + 1)"""
        n, k = len(self.theta), self.num_kept
        table = torch.full((n + 1, k + 1), NEVER, dtype=torch.float64)
        table[0, 0] = 0.0
        for i in range(n):
            table[i + 1] = table[i]
            table[i + 1, 1:] = torch.logaddexp(table[i, 1:], self.theta[i] + table[i, :-1])
        return table

    def log_prob(self, subsets: Tensor) -> Tensor:
        """Log-probability of `subsets` (N, n) of zeros and ones, each with k ones. (N,) float64"""
        return subsets.double() @ self.theta - self._after[0, self.num_kept]

    def sample(self, num_samples: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Independent exact draws: (num_samples, n) bool."""
        left = torch.full((num_samples,), self.num_kept)
        taken = torch.zeros(num_samples, len(self.theta), dtype=torch.bool)
        uniform = torch.rand(num_samples, len(self.theta), dtype=torch.float64, generator=generator)
        for i, theta in enumerate(self.theta):
            keep = torch.exp(
                theta + self._after[i + 1][(left - 1).clamp_min(0)] - self._after[i][left]
            )
            taken[:, i] = (left > 0) & (uniform[:, i] < keep)
            left = left - taken[:, i].long()
        return taken

    def marginals(self) -> Tensor:
        """Probability that each unit is kept (n,), which sum to k."""
        if self.num_kept == 0:
            return torch.zeros_like(self.theta)
        before, k = self._prefix_table(), self.num_kept
        others = before[:-1, :k] + self._after[1:, :k].flip(
            -1
        )  # j of the units before, k - 1 - j of those after
        return (self.theta + others.logsumexp(-1) - self._after[0, k]).exp().clamp(0, 1)

    def entropy(self) -> float:
        """Entropy in nats: log of the normalizer minus the expected sum of theta."""
        return max(float(self._after[0, self.num_kept] - self.marginals() @ self.theta), 0.0)

    def most_probable(self, count: int = 1) -> Tensor:
        """The `count` most probable subsets, best first, all where there are fewer: (m, n) bool.

        Ties go to the units that come first. Subsets are reached from the best one by moving one
        kept unit down the order of theta at a time, best first.
        """
        n, k = len(self.theta), self.num_kept
        order = sorted(range(n), key=lambda i: (-float(self.theta[i]), i))
        values = [float(self.theta[i]) for i in order]
        first = tuple(range(k))
        ranked, counter = [], itertools.count()
        heap = [(-sum(values[i] for i in first), next(counter), first)]
        seen = {first}
        while heap and len(ranked) < count:
            weight, _, places = heapq.heappop(heap)
            ranked.append(places)
            for at in range(k):
                moved = places[at] + 1
                if moved < n and moved not in places:
                    following = (*places[:at], moved, *places[at + 1 :])
                    if following not in seen:
                        seen.add(following)
                        heapq.heappush(
                            heap,
                            (weight + values[places[at]] - values[moved], next(counter), following),
                        )
        subsets = torch.zeros(len(ranked), n, dtype=torch.bool)
        for row, places in zip(subsets, ranked):
            row[[order[i] for i in places]] = True
        return subsets
