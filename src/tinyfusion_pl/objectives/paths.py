"""Paths from noise to data, and what a network predicts on them.

x_t = alpha(t) x0 + sigma(t) noise, with t from 0 (noise) to 1 (data).

SiT (arXiv 2401.08740), section 3.1 and appendix: linear, GVP (generalized variance preserving) and
VP (variance preserving, score SDE). There t runs the other way; the published code and weights use
the direction used here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

PATHS = ("linear", "gvp", "vp")
PREDICTIONS = ("velocity", "noise", "score")
VP_BETA_MIN, VP_BETA_MAX = 0.1, 20.0


@dataclass
class Coefficients:
    """alpha, sigma and their derivatives in t at given times.

    With v = dx_t/dt, s the score and e the noise: v = d_alpha x0 + d_sigma e and s = -e / sigma, so
    v = drift x_t + diffusion s.
    """

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor

    @property
    def drift(self) -> Tensor:
        """The derivative of log(alpha)."""
        return self.d_alpha / self.alpha

    @property
    def diffusion(self) -> Tensor:
        """Half the squared noise factor of the SDE from data to noise with these marginals."""
        return self.drift * self.sigma.square() - self.sigma * self.d_sigma

    def velocity(self, prediction: str, output: Tensor, x: Tensor) -> Tensor:
        """The velocity that an output for `x` implies; `prediction` is one of `PREDICTIONS`."""
        if prediction == "velocity":
            return output
        noise = output if prediction == "noise" else -self.sigma * output
        return self.drift * x + (self.d_sigma - self.drift * self.sigma) * noise

    def noise(self, prediction: str, output: Tensor, x: Tensor) -> Tensor:
        """The noise that an output for `x` implies."""
        if prediction == "noise":
            return output
        if prediction == "score":
            return -self.sigma * output
        return (self.d_alpha * x - self.alpha * output) / (
            self.d_alpha * self.sigma - self.alpha * self.d_sigma
        )

    def score(self, prediction: str, output: Tensor, x: Tensor) -> Tensor:
        """The score that an output for `x` implies."""
        return output if prediction == "score" else -self.noise(prediction, output, x) / self.sigma

    def target(self, prediction: str, x0: Tensor, noise: Tensor) -> Tensor:
        """The training target for data `x0` and `noise`."""
        if prediction == "velocity":
            return self.d_alpha * x0 + self.d_sigma * noise
        return noise if prediction == "noise" else -noise / self.sigma


def coefficients(path: str, t: Tensor) -> Coefficients:
    """Coefficients of `path`, one of `PATHS`, at times `t` in [0, 1], each in the shape of `t`."""
    if path == "linear":
        return Coefficients(t, 1 - t, torch.ones_like(t), -torch.ones_like(t))
    if path == "gvp":
        angle, speed = t * math.pi / 2, math.pi / 2
        return Coefficients(angle.sin(), angle.cos(), speed * angle.cos(), -speed * angle.sin())
    left = 1 - t
    log_alpha = -left.square() / 4 * (VP_BETA_MAX - VP_BETA_MIN) - left / 2 * VP_BETA_MIN
    rate = left / 2 * (VP_BETA_MAX - VP_BETA_MIN) + VP_BETA_MIN / 2  # d log_alpha / dt
    alpha, sigma = log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()
    return Coefficients(alpha, sigma, alpha * rate, -alpha.square() * rate / sigma)
