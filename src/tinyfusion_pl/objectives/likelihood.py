"""Gaussian KL divergence and the likelihood of 8-bit data, in nats.

Ho et al. 2006.11239, equations 5 and 13.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gaussian_kl(
    mean_a: Tensor, log_variance_a: Tensor, mean_b: Tensor, log_variance_b: Tensor
) -> Tensor:
    """Elementwise KL(a || b) of diagonal Gaussians, in nats."""
    ratio = log_variance_a - log_variance_b
    return 0.5 * (ratio.exp() - 1 - ratio + (mean_a - mean_b).square() * (-log_variance_b).exp())


def standard_normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation of the normal distribution function that published losses use."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log-probability, in nats, of the 2/255-wide bin around `x` in [-1, 1] under a Gaussian.

    The outermost bins extend to infinity.
    """
    centered, inverse = x - mean, (-log_scale).exp()
    above = standard_normal_cdf(inverse * (centered + 1 / 255))
    below = standard_normal_cdf(inverse * (centered - 1 / 255))
    log_above, log_rest = above.clamp_min(1e-12).log(), (1 - below).clamp_min(1e-12).log()
    inside = (above - below).clamp_min(1e-12).log()
    return torch.where(x < -0.999, log_above, torch.where(x > 0.999, log_rest, inside))
