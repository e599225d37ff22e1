"""Solving an interpolant's ODE or SDE from noise (t = 0) to data (t = 1), with classifier-free guidance (SiT, arXiv 2401.08740).

ODE: dx = v dt (equation 2). SDE: dx = (v + w s) dt + sqrt(2 w) dW (equation 5, whose w is twice this one), which has the same marginals for
every diffusion coefficient w(t) >= 0 (section 3.4).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion_pl.objectives.guidance import check_guidance, guided
from tinyfusion_pl.objectives.interpolant_process import InterpolantProcess
from tinyfusion_pl.objectives.paths import Coefficients, coefficients
from tinyfusion_pl.objectives.sampling_noise import check_noise, given_or_drawn

ODE_SAMPLERS = ("euler", "heun", "dopri5")
SDE_SAMPLERS = ("euler_maruyama", "sde_heun")
LAST_STEPS = ("none", "mean", "tweedie", "euler")
EPS = 1e-3

# w(t) / diffusion_norm, of the coefficients and t (section 3.4, table 5, and the published code).
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
    """How an interpolant is sampled.

    Args:
        num_sampling_steps: Steps, evenly spread, an SDE's last step among them. A step is one call of the denoiser, or two with ``heun``
            and ``sde_heun`` (not in the last step). The published code counts time points: its ``num_steps=n`` is n - 1 here for an ODE or
            an SDE without a last step, and n for an SDE with one (published: 250). ``dopri5`` chooses its steps itself and does not read
            this.
        sampler: An ODE's: ``"euler"``, ``"heun"``, ``"dopri5"``; an SDE's: ``"euler_maruyama"``, ``"sde_heun"``.
        atol, rtol: Tolerances of ``dopri5``, > 0 (published: 1e-6 and 1e-3). Its step sizes are the whole batch's, so a sample depends on
            its batch to within them; the other samplers' do not.
        diffusion: SDE's coefficient w(t): one of `DIFFUSIONS` (published: "sigma").
        diffusion_norm: Factor of w, >= 0; 0 makes the SDE the ODE.
        last_step: From `last_step_size` before t = 1 to there, without noise: ``"mean"``, a step of the SDE's drift; ``"euler"``, of the
            ODE's; ``"tweedie"``, to the expectation of the data given x_t; ``"none"``: the random steps go to the end.
        last_step_size: In (0, 1) (published: 0.04).
        guidance_scale, guidance_channels: See `guided` (published: 1.5, 3 channels).

    Raises:
        ValueError: for settings out of range.
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
                f"last_step_size is {self.last_step_size}; give a number in (0, 1) (published: 0.04), or last_step='none'."
            )
        if self.num_sampling_steps < (least := 1 + self.has_last_step):
            raise ValueError(
                f"num_sampling_steps is {self.num_sampling_steps}; give at least {least}"
                f"{', one of which is the last step' if self.has_last_step else ''}."
            )

    @property
    def is_sde(self) -> bool:
        return self.sampler in SDE_SAMPLERS

    @property
    def has_last_step(self) -> bool:
        return self.is_sde and self.last_step != "none"

    @property
    def num_random_steps(self) -> int:
        """Steps that draw noise."""
        return self.num_sampling_steps - self.has_last_step if self.is_sde else 0

    def interval(self, process: InterpolantProcess) -> tuple[float, float]:
        """Where the steps (the last one aside) begin and end: at 0 and 1 but for ends at which what they compute is singular.

        Raises:
            ValueError: for ``sample_eps=0`` at such an end.
        """
        start, end = process.singular_ends()
        if self.is_sde:  # the score at t = 1 is singular, and "sbdm" where alpha is 0
            start, end = (
                start or (self.diffusion == "sbdm" and process.path != "vp"),
                not self.has_last_step,
            )
        eps = EPS if process.sample_eps is None else process.sample_eps
        if eps == 0 and (start or end):
            raise ValueError(
                f"sample_eps is 0, but {process.prediction} prediction on the path {process.path!r} sampled with "
                f"{self.sampler!r} is singular at t = {0 if start else 1}; give sample_eps > 0 (published: 1e-3)."
            )
        return eps * start, 1 - (self.last_step_size if self.has_last_step else eps * end)


@dataclass
class _Guided:
    """What the solvers ask at a time t: the velocity and the score that the guided denoiser says there."""

    process: InterpolantProcess
    denoiser: nn.Module
    y: Tensor
    options: SamplingOptions

    def ask(self, x: Tensor, t: float | Tensor) -> tuple[Tensor, Coefficients, Tensor]:
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
        output, c, _ = self.ask(x, t)
        return c.velocity(self.process.prediction, output, x)

    def w(self, c: Coefficients, t: Tensor) -> Tensor:
        return self.options.diffusion_norm * DIFFUSIONS[self.options.diffusion](c, t)

    def sde(self, x: Tensor, t: float) -> Tensor:
        """The SDE's drift v + w s."""
        output, c, time = self.ask(x, t)
        prediction = self.process.prediction
        return c.velocity(prediction, output, x) + self.w(c, time) * c.score(prediction, output, x)

    def deviation(self, x: Tensor, t: float) -> Tensor:
        """sqrt(2 w), of the noise of an SDE over time 1."""
        time = torch.full((len(x), *[1] * (x.ndim - 1)), t, device=x.device)
        return (2 * self.w(coefficients(self.process.path, time), time)).sqrt()

    def data(self, x: Tensor, t: float) -> Tensor:
        """The expectation of the data given x (Tweedie)."""
        output, c, _ = self.ask(x, t)
        return (x - c.sigma * c.noise(self.process.prediction, output, x)) / c.alpha


def sample_interpolant(
    process: InterpolantProcess,
    denoiser: nn.Module,
    z: Tensor,
    y: Tensor,
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Tensor:
    """Samples (N, C, H, W) from noise `z` (N, C, H, W) with labels `y` (N,).

    Args:
        process, denoiser: The process and the network, called with times in [0, 1].
        noise: (num_noises, N, C, H, W), the first for the noisiest step; default: drawn.
        generator: Where noise is drawn from; its device may be another than that of `z`.
        options: See `SamplingOptions`.

    Raises:
        ValueError: for settings out of range, noise of another shape, or where ``dopri5`` cannot go on.
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
        t, drift = start + i * step, field.velocity
        if opts.is_sde:
            drift = field.sde
            kick = field.deviation(x, t) * math.sqrt(step) * given_or_drawn(noise, i, x, generator)
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
        # A step must land on the end: by itself the solver steps past it, where the paths are not defined, and interpolates.
        return odeint(
            lambda t, x: field.velocity(x, t),
            z,
            ends,
            method="dopri5",
            atol=options.atol,
            rtol=options.rtol,
            options={"step_t": ends[1:]},
        )[-1]
    except AssertionError as error:  # its steps became too small to count
        raise ValueError(
            f"dopri5 cannot solve the ODE to atol={options.atol} and rtol={options.rtol}: the model has diverged, or they are "
            f"too small for {z.dtype} ({error}). Give larger ones, or another sampler."
        ) from error
