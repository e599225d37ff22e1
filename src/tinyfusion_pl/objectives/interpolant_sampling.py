"""Solvers for an interpolant's ODE or SDE, with classifier-free guidance (SiT, arXiv 2401.08740).

They go from noise (t = 0) to data (t = 1).

ODE: dx = v dt (equation 2). SDE: dx = (v + w s) dt + sqrt(2 w) dW (equation 5, with half its w).
The marginals are the same for every diffusion coefficient w(t) >= 0 (section 3.4).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from tinyfusion_pl.objectives.guidance import check_guidance, guided
from tinyfusion_pl.objectives.interpolant_process import InterpolantProcess
from tinyfusion_pl.objectives.paths import Coefficients, coefficients
from tinyfusion_pl.objectives.sampling_noise import check_noise, get_noise
from tinyfusion_pl.protocols import Denoises

ODE_SAMPLERS = ("euler", "heun", "dopri5")
SDE_SAMPLERS = ("euler_maruyama", "sde_heun")
LAST_STEPS = ("none", "mean", "tweedie", "euler")
EPS = 1e-3

# w(t) / diffusion_norm from the coefficients and t (section 3.4, table 5, and published code).
DIFFUSIONS: dict[str, Callable[[Coefficients, Tensor], Tensor]] = {
    "constant": lambda c, t: torch.ones_like(t),
    "sbdm": lambda c, t: c.diffusion,
    "sigma": lambda c, t: c.sigma,
    "linear": lambda c, t: 1 - t,
    "decreasing": lambda c, t: ((math.pi * t).cos() + 1).square() / 4,
    "increasing-decreasing": lambda c, t: (math.pi * t).sin().square(),
}


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Options for sampling from an interpolant.

    Args:
        num_sampling_steps: Number of evenly spaced steps, including an SDE's last step. A step
            calls the denoiser once, or twice with ``heun`` and ``sde_heun`` (except in the last
            step). The published code counts time points: its ``num_steps=n`` is n - 1 here for an
            ODE or an SDE without a last step, and n for an SDE with one (published: 250).
            ``dopri5`` chooses its own steps and ignores this.
        sampler: ``"euler"``, ``"heun"`` or ``"dopri5"`` (ODE), ``"euler_maruyama"`` or
            ``"sde_heun"`` (SDE).
        atol: Absolute tolerance of ``dopri5``, > 0 (published: 1e-6). It chooses step sizes for the
            whole batch, so a sample depends on its batch within the tolerances; with other samplers
            it does not.
        rtol: Relative tolerance of ``dopri5``, > 0 (published: 1e-3).
        diffusion: Diffusion coefficient w(t) of the SDE: one of `DIFFUSIONS` (published: "sigma").
        diffusion_norm: Factor of w, >= 0; with 0 the SDE equals the ODE.
        last_step: The last step of an SDE, without noise, of size `last_step_size` to t = 1:
            ``"mean"``, along the SDE's drift; ``"euler"``, along the ODE's; ``"tweedie"``, to the
            expectation of the data given x_t; ``"none"``: random steps reach the end.
        last_step_size: Size of the last step, in (0, 1) (published: 0.04).
        guidance_scale: See `guided` (published: 1.5).
        guidance_channels: See `guided` (published: 3).

    Raises:
        ValueError: For settings out of range.
    """

    num_sampling_steps: int = 250
    sampler: str = "euler_maruyama"
    atol: float = 1e-6
    rtol: float = 1e-3
    diffusion: str = "sigma"
    diffusion_norm: float = 1.0
    last_step: str = "mean"
    last_step_size: float = 0.04
    guidance_scale: float = 1.0
    guidance_channels: int | None = 3

    def __post_init__(self) -> None:
        for name, known in (
            ("sampler", ODE_SAMPLERS + SDE_SAMPLERS),
            ("diffusion", DIFFUSIONS),
            ("last_step", LAST_STEPS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; give one of {', '.join(map(repr, known))}."
                )
        if self.sampler == "dopri5" and find_spec("torchdiffeq") is None:
            raise ValueError(
                "sampler='dopri5' needs torchdiffeq, which is not installed. Install it with the "
                "extra: pip install 'tinyfusion_pl[eval]'."
            )
        check_guidance(self.guidance_channels, self.guidance_scale)
        for name in ("atol", "rtol"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give a number > 0.")
        if not self.diffusion_norm >= 0:
            raise ValueError(
                f"diffusion_norm is {self.diffusion_norm}; give a number >= 0 (published: 1)."
            )
        if self.has_last_step and not 0 < self.last_step_size < 1:
            raise ValueError(
                f"last_step_size is {self.last_step_size}; give a number in (0, 1) (published: "
                "0.04), or last_step='none'."
            )
        if self.num_sampling_steps < (least := 1 + self.has_last_step):
            raise ValueError(
                f"num_sampling_steps is {self.num_sampling_steps}; give at least {least}"
                f"{', including the last step' if self.has_last_step else ''}."
            )

    @property
    def is_sde(self) -> bool:
        """Whether the sampler solves the SDE."""
        return self.sampler in SDE_SAMPLERS

    @property
    def has_last_step(self) -> bool:
        """Whether the SDE ends with a separate step without noise."""
        return self.is_sde and self.last_step != "none"

    @property
    def num_random_steps(self) -> int:
        """Number of steps that draw noise."""
        return self.num_sampling_steps - self.has_last_step if self.is_sde else 0

    def interval(self, process: InterpolantProcess) -> tuple[float, float]:
        """Where the steps start and end, except a separate last step.

        At 0 and 1, unless the drift is singular there.

        Raises:
            ValueError: For ``sample_eps=0`` if the drift is singular at an end.
        """
        start, end = process.singular_ends()
        if self.is_sde:  # the score is singular at t = 1, "sbdm" at alpha = 0
            start, end = (
                start or (self.diffusion == "sbdm" and process.path != "vp"),
                not self.has_last_step,
            )
        eps = EPS if process.sample_eps is None else process.sample_eps
        if eps == 0 and (start or end):
            raise ValueError(
                f"sample_eps is 0, but {process.prediction} prediction on path {process.path!r} "
                f"with sampler {self.sampler!r} is singular at t = {0 if start else 1}; give "
                "sample_eps > 0 (published: 1e-3)."
            )
        return eps * start, 1 - (self.last_step_size if self.has_last_step else eps * end)


@dataclass
class _Guided:
    """Velocity and score of the guided denoiser at time t, as solvers need them."""

    process: InterpolantProcess
    denoiser: Denoises
    y: Tensor
    options: SamplingOptions

    def predict(self, x: Tensor, t: float | Tensor) -> tuple[Tensor, Coefficients, Tensor]:
        t = torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(len(x))
        output = guided(
            self.denoiser,
            x,
            t,
            self.y,
            guidance_scale=self.options.guidance_scale,
            guidance_channels=self.options.guidance_channels,
        )
        return (
            self.process.checked(output, x),
            self.process.coefficients(t, x),
            t.view(-1, *[1] * (x.ndim - 1)),
        )

    def velocity(self, x: Tensor, t: float | Tensor) -> Tensor:
        output, c, _ = self.predict(x, t)
        return c.velocity(self.process.prediction, output, x)

    def w(self, c: Coefficients, t: Tensor) -> Tensor:
        return self.options.diffusion_norm * DIFFUSIONS[self.options.diffusion](c, t)

    def sde(self, x: Tensor, t: float | Tensor) -> Tensor:
        """The SDE's drift v + w s."""
        output, c, time = self.predict(x, t)
        prediction = self.process.prediction
        return c.velocity(prediction, output, x) + self.w(c, time) * c.score(prediction, output, x)

    def deviation(self, x: Tensor, t: float) -> Tensor:
        """sqrt(2 w), the standard deviation of the SDE's noise per unit of time."""
        time = torch.full((len(x), *[1] * (x.ndim - 1)), t, device=x.device)
        return (2 * self.w(coefficients(self.process.path, time), time)).sqrt()

    def data(self, x: Tensor, t: float) -> Tensor:
        """The expectation of the data given x (Tweedie)."""
        output, c, _ = self.predict(x, t)
        return (x - c.sigma * c.noise(self.process.prediction, output, x)) / c.alpha


def sample_interpolant(
    process: InterpolantProcess,
    denoiser: Denoises,
    z: Tensor,
    y: Tensor,
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Tensor:
    """Samples (N, C, H, W) from noise `z` (N, C, H, W) with labels `y` (N,).

    Args:
        process: The interpolant process.
        denoiser: The network; called with times in [0, 1].
        z: Noise (N, C, H, W).
        y: Labels (N,).
        noise: (num_noises, N, C, H, W), noisiest step first; default: drawn.
        generator: Source of the noise; it may be on another device than `z`.
        **options: See `SamplingOptions`.

    Raises:
        ValueError: For settings out of range, noise of the wrong shape, or if ``dopri5`` fails.
    """
    opts = SamplingOptions(**options)
    start, end = opts.interval(process)
    check_noise(noise, z, num_noises=opts.num_random_steps)
    field = _Guided(process, denoiser, y, opts)
    if opts.sampler == "dopri5":
        return _dopri5(field, z, start, end)
    num_steps = opts.num_random_steps or opts.num_sampling_steps
    step = (end - start) / num_steps
    x = z
    for i in range(num_steps):
        t = start + i * step
        drift = field.sde if opts.is_sde else field.velocity
        if opts.is_sde:
            kick = field.deviation(x, t) * math.sqrt(step) * get_noise(noise, i, x, generator)
        if opts.sampler == "euler_maruyama":
            x = x + step * drift(x, t) + kick
            continue
        if opts.sampler == "sde_heun":
            x = x + kick
        slope = drift(x, t)
        if opts.sampler != "euler":
            slope = (slope + drift(x + step * slope, t + step)) / 2
        x = x + step * slope
    if opts.last_step == "tweedie" and opts.has_last_step:
        return field.data(x, end)
    if opts.has_last_step:
        x = x + opts.last_step_size * (field.sde if opts.last_step == "mean" else field.velocity)(
            x, end
        )
    return x


def _dopri5(field: _Guided, z: Tensor, start: float, end: float) -> Tensor:
    from torchdiffeq import odeint  # in the extra `eval`

    options, ends = field.options, torch.tensor([start, end], device=z.device)
    try:
        # Force a step onto the end: by default the solver steps past it, where the paths are not
        # defined, and interpolates.
        return odeint(
            lambda t, x: field.velocity(x, t),
            z,
            ends,
            method="dopri5",
            atol=options.atol,
            rtol=options.rtol,
            options={"step_t": ends[1:]},
        )[-1]
    except AssertionError as error:  # the step size underflowed
        raise ValueError(
            f"dopri5 cannot solve the ODE to atol={options.atol} and rtol={options.rtol}: the "
            f"model has diverged, or the tolerances are too small for {z.dtype} ({error}). Raise "
            "the tolerances, or use another sampler."
        ) from error
