"""SiT's stochastic interpolants (Ma et al., arXiv 2401.08740): losses, distillation losses, ODE and SDE sampling.

x_t = alpha(t) x0 + sigma(t) noise, t from 0 (noise) to 1 (data). Loss: mean square of the prediction's error (equations 3, 4 and 9 with
the weightings of section 3.2 and table 4).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion_pl.objectives.base import Distance, Draw, check_channels, mean_square
from tinyfusion_pl.objectives.interpolant_sampling import SamplingOptions, sample_interpolant
from tinyfusion_pl.objectives.paths import PATHS, PREDICTIONS, Coefficients, coefficients

LOSS_WEIGHTINGS = ("none", "velocity", "likelihood")
TRAIN_EPS = {"vp": 1e-5}  # published, as the two below
EPS = 1e-3


class Interpolants:
    """The interpolant process, its training and distillation losses, and its samplers.

    Args:
        path: ``"linear"``, ``"gvp"`` or ``"vp"`` (see `tinyfusion_pl.objectives.paths`).
        prediction: What the denoiser gives: ``"velocity"``, ``"noise"`` or ``"score"``.
        loss_weighting: Of noise and score losses: ``"none"``; ``"velocity"``, the weight that a velocity loss gives the error;
            ``"likelihood"``, the weight that bounds the likelihood. A velocity loss takes ``"none"``.
        train_eps: How far training times stay from ends where the process is singular, in [0, 0.5). Default, as published: 1e-5 for the
            VP path (at t = 1); else 0 for velocity and 1e-3 for noise and score (at both ends).
        sample_eps: The same for sampling. Default, as published: 1e-3, but 0 where the ODE of a linear or GVP velocity is solved.

    Raises:
        ValueError: for settings out of range or that do not go together.
    """

    sampling_options = SamplingOptions  # has the parameters that `sample` takes

    def __init__(self, *, path: str = "linear", prediction: str = "velocity", loss_weighting: str = "none",
                 train_eps: float | None = None, sample_eps: float | None = None) -> None:
        for name, value, known in (("path", path, PATHS), ("prediction", prediction, PREDICTIONS),
                                   ("loss_weighting", loss_weighting, LOSS_WEIGHTINGS)):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; give one of {', '.join(map(repr, known))}.")
        if prediction == "velocity" and loss_weighting != "none":
            raise ValueError(f"loss_weighting is {loss_weighting!r}, but a velocity loss has no other weighting than 'none'; set "
                             "loss_weighting to 'none', or prediction to 'noise' or 'score'.")
        for name, value in (("train_eps", train_eps), ("sample_eps", sample_eps)):
            if value is not None and not 0 <= value < 0.5:
                raise ValueError(f"{name} is {value}; give a number in [0, 0.5), or null for the published one.")
        self.path, self.prediction, self.loss_weighting = path, prediction, loss_weighting
        self.train_eps, self.sample_eps = train_eps, sample_eps

    def coefficients(self, t: Tensor, like: Tensor) -> Coefficients:
        """The path's coefficients at `t` (N,), shaped to broadcast over `like` (N, ...)."""
        return coefficients(self.path, t.float().view(-1, *[1] * (like.ndim - 1)))

    def singular_ends(self) -> tuple[bool, bool]:
        """Whether the velocity that the prediction says is singular at t = 0, and at t = 1."""
        return self.path != "vp" and self.prediction != "velocity", self.path == "vp" or self.prediction != "velocity"

    def check_fits(self, denoiser: nn.Module) -> None:
        """Raise ValueError for a denoiser that predicts another number of channels than its latents have."""
        check_channels(denoiser, expected=1, objective="an interpolant")

    # -- training -----------------------------------------------------------------------------------------------------------------------
    def draw(self, x0: Tensor, *, t: Tensor | None = None, noise: Tensor | None = None) -> Draw:
        """x_t = alpha(t) x0 + sigma(t) noise, at uniformly random times t (N,) unless given."""
        if t is None:
            eps = TRAIN_EPS.get(self.path, EPS) if self.train_eps is None else self.train_eps
            start, end = (eps * singular for singular in self.singular_ends())
            t = start + (1 - start - end) * torch.rand(len(x0), device=x0.device)
        if noise is None:
            noise = torch.randn_like(x0)
        c = self.coefficients(t, x0)
        return Draw(x0, (c.alpha * x0 + c.sigma * noise).to(x0.dtype), t, noise)

    def losses(self, output: Tensor, draw: Draw) -> dict[str, Tensor]:
        """Per sample (N,): "loss", the weighted mean square of the prediction's error.

        A score's error is taken times sigma, which makes it the noise's.

        Raises:
            ValueError: for another number of channels than the latents have.
        """
        c = self.coefficients(draw.t, draw.x_t)
        return {"loss": self._loss(output, c.target(self.prediction, draw.x0, draw.noise), c, draw)}

    def distillation_losses(self, output: Tensor, teacher_output: Tensor, draw: Draw, *,
                            distance: Distance = mean_square) -> dict[str, Tensor]:
        """Per sample (N,): "loss_kd", the same as the "loss" of `losses` with the teacher's output as the target, by `distance`."""
        c = self.coefficients(draw.t, draw.x_t)
        return {"loss_kd": self._loss(output, self.checked(teacher_output.detach(), draw.x_t), c, draw, distance)}

    def _loss(self, output: Tensor, target: Tensor, c: Coefficients, draw: Draw, distance: Distance = mean_square) -> Tensor:
        output = self.checked(output, draw.x_t)
        return distance(self._weighted(output, c), self._weighted(target, c))

    def _weighted(self, prediction: Tensor, c: Coefficients) -> Tensor:
        """`prediction` times the square root of the weight of its squared error."""
        if self.prediction == "score":
            prediction = prediction * c.sigma
        if self.loss_weighting == "velocity":
            prediction = prediction * c.diffusion / c.sigma
        elif self.loss_weighting == "likelihood":
            prediction = prediction * c.diffusion.sqrt() / c.sigma
        return prediction

    def checked(self, output: Tensor, like: Tensor) -> Tensor:
        """The denoiser's output in float32."""
        if output.shape != like.shape:
            raise ValueError(f"The denoiser gave outputs of shape {tuple(output.shape)} for latents of shape {tuple(like.shape)}; "
                             "interpolants expect the latents' shape: a SiT, or a denoiser with learn_sigma=False.")
        return output.float()

    # -- sampling -----------------------------------------------------------------------------------------------------------------------
    def check_sampling(self, **options: Any) -> None:
        """Raise ValueError for options that `sample` would refuse."""
        SamplingOptions(**options).interval(self)

    def num_noises(self, **options: Any) -> int:
        """One for each step where the sampler is random: all of an SDE's but a last step of its own kind."""
        return SamplingOptions(**options).num_random_steps

    @torch.no_grad()
    def sample(self, denoiser: nn.Module, z: Tensor, y: Tensor, **options: Any) -> Tensor:
        """Samples (N, C, H, W) from noise `z`; see `sample_interpolant` and `SamplingOptions` (interpolant_sampling)."""
        return sample_interpolant(self, denoiser, z, y, **options)
