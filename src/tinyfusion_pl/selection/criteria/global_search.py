"""A learned choice of k of all n units.

A distribution over k-subsets, trained with forward passes of the dense weights only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tinyfusion_pl.selection.candidates import (
    distributions,
    most_probable_structures,
    sample_structures,
)
from tinyfusion_pl.selection.problem import CANDIDATES, SEARCH, Choice, Problem
from tinyfusion_pl.selection.space import Space


class GlobalSearch:
    """Learns a distribution over k-subsets whose outputs are close to the dense model's.

    p(S) is proportional to exp(sum of theta_i over S), |S| = k.

    Each step draws `num_subsets` structures for each of `num_samples` samples, runs each sample
    through its own kept blocks without a graph, and takes l = log(distance to the dense model's
    output). With the other subsets of the same sample as baseline, the advantage is a = (l - mean
    of the sample's l) * K / (K - 1), and the mean of a * (S - marginals) is an unbiased estimate of
    the gradient of E[l] in theta (score function). Adam steps theta; the average of theta decides.
    There is no temperature and no backward pass, and nothing is enumerated: 14 of 28 costs per step
    what its kept blocks cost.

    Args:
        num_steps: Steps of the search, >= 1.
        num_samples: Samples of a step, >= 1.
        num_subsets: K, structures of each sample, >= 2.
        lr: Learning rate of Adam (betas 0.9, 0.99), > 0.
        average_decay: Decay of the average of theta, in [0, 1).
        num_considered: Most probable structures that are handed on for trials.
    """

    name = "global"

    def __init__(
        self,
        *,
        num_steps: int = 200,
        num_samples: int = 32,
        num_subsets: int = 4,
        lr: float = 0.1,
        average_decay: float = 0.95,
        num_considered: int = 4,
    ) -> None:
        for name, value, least in (
            ("num_steps", num_steps, 1),
            ("num_samples", num_samples, 1),
            ("num_subsets", num_subsets, 2),
            ("num_considered", num_considered, 1),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; give {least} or more.")
        if not lr > 0 or not 0 <= average_decay < 1:
            raise ValueError(
                f"lr is {lr} and average_decay {average_decay}; give lr > 0 and a decay in [0, 1)."
            )
        self.num_steps, self.num_samples, self.num_subsets, self.lr = (
            num_steps,
            num_samples,
            num_subsets,
            lr,
        )
        self.average_decay, self.num_considered = average_decay, num_considered

    def __call__(self, problem: Problem) -> Choice:
        """Choose the units that stay."""
        space, generator = problem.space, problem.generator(CANDIDATES)
        theta = torch.zeros(space.num_units, dtype=torch.float64)
        average, optimizer = theta.clone(), torch.optim.Adam([theta], lr=self.lr, betas=(0.9, 0.99))
        history: list[dict[str, Any]] = []
        if (before := problem.progress.load("search")) is not None:
            theta.copy_(before["theta"])
            average.copy_(before["average"])
            optimizer.load_state_dict(before["optimizer"])
            generator.set_state(before["generator"])
            history = before["history"]
        calibrations = problem.stream(self.num_samples, SEARCH, len(history))
        index = torch.arange(self.num_samples).repeat_interleave(self.num_subsets)
        with problem.progress.steps():
            for step in range(len(history), self.num_steps):
                calibration = problem.structures.ask(next(calibrations))
                structures = sample_structures(space, theta, len(index), generator=generator)
                distances = problem.structures.per_sample(calibration, structures, index)
                losses = (
                    (distances.double().cpu() + 1e-12)
                    .log()
                    .view(self.num_samples, self.num_subsets)
                )
                if not torch.isfinite(losses).all():
                    raise ValueError(
                        f"At step {step + 1} of the search the model's output was not finite. Use "
                        "higher precision (float32)."
                    )
                theta.grad = estimate_gradient(losses, structures, marginals(problem.space, theta))
                optimizer.step()
                average.lerp_(theta, 1 - self.average_decay)
                history.append(
                    {
                        "step": step + 1,
                        "loss": float(losses.mean()),
                        "structure": space.top(average),
                        "theta": average.clone(),
                    }
                )
                problem.on_step(history)
                problem.progress.step(
                    "search",
                    lambda: {
                        "theta": theta,
                        "average": average,
                        "optimizer": optimizer.state_dict(),
                        "generator": generator.get_state(),
                        "history": history,
                    },
                )
        considered = most_probable_structures(space, average, self.num_considered)
        return Choice(
            space.top(average),
            scores=average.clone(),
            theta=average,
            considered=considered,
            history=history,
        )


def estimate_gradient(losses: Tensor, structures: Tensor, mu: Tensor) -> Tensor:
    """Unbiased estimate of the gradient in theta of the expected loss.

    Args:
        losses: (N, K) of K independent structures for each of N samples.
        structures: (N * K, n) bool, sample by sample.
        mu: (n,) marginals of the distribution they were drawn from.
    """
    k = losses.shape[1]
    advantages = (losses - losses.mean(1, keepdim=True)) * k / (k - 1)
    return (advantages.reshape(-1, 1) * (structures.to(mu) - mu)).mean(0)


def marginals(space: Space, theta: Tensor) -> Tensor:
    """Probability of each unit to stay at `theta` (num_units,)."""
    mu = torch.zeros(space.num_units, dtype=torch.float64)
    mu[list(space.fixed)] = 1.0
    for part, distribution in zip(space.parts, distributions(space, theta)):
        mu[space.free(part)] = distribution.marginals()
    return mu
