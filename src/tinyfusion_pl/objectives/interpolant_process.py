"""The process of SiT's stochastic interpolants (Ma et al., arXiv 2401.08740).

x_t = alpha(t) x0 + sigma(t) noise, with t from 0 (noise) to 1 (data).
"""

from __future__ import annotations

from torch import Tensor

from tinyfusion_pl.objectives.paths import PATHS, PREDICTIONS, Coefficients, coefficients

LOSS_WEIGHTINGS = ("none", "velocity", "likelihood")


class InterpolantProcess:
    """A path from noise to data, and how to read the denoiser's prediction on it.

    Args:
        path: ``"linear"``, ``"gvp"`` or ``"vp"`` (see `tinyfusion_pl.objectives.paths`).
        prediction: What the denoiser predicts: ``"velocity"``, ``"noise"`` or ``"score"``.
        loss_weighting: Weighting of noise and score losses: ``"none"``; ``"velocity"``, the weight
            that the error has in a velocity loss; ``"likelihood"``, the weight that bounds the
            likelihood. A velocity loss accepts ``"none"`` only.
        train_eps: Distance of training times from ends where the process is singular, in [0, 0.5).
            Default, as published: 1e-5 for the VP path (at t = 1); otherwise 0 for velocity and
            1e-3 for noise and score (at both ends).
        sample_eps: The same for sampling. Default, as published: 1e-3, but 0 for the ODE of a
            linear or GVP velocity.

    Raises:
        ValueError: For settings out of range or a combination that is not supported.
    """

    def __init__(
        self,
        *,
        path: str = "linear",
        prediction: str = "velocity",
        loss_weighting: str = "none",
        train_eps: float | None = None,
        sample_eps: float | None = None,
    ) -> None:
        for name, value, known in (
            ("path", path, PATHS),
            ("prediction", prediction, PREDICTIONS),
            ("loss_weighting", loss_weighting, LOSS_WEIGHTINGS),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; give one of {', '.join(map(repr, known))}.")
        if prediction == "velocity" and loss_weighting != "none":
            raise ValueError(
                f"loss_weighting is {loss_weighting!r}, but a velocity loss supports 'none' only; "
                "set loss_weighting to 'none', or prediction to 'noise' or 'score'."
            )
        for name, eps in (("train_eps", train_eps), ("sample_eps", sample_eps)):
            if eps is not None and not 0 <= eps < 0.5:
                raise ValueError(
                    f"{name} is {eps}; give a number in [0, 0.5), or null for the published value."
                )
        self.path, self.prediction, self.loss_weighting = path, prediction, loss_weighting
        self.train_eps, self.sample_eps = train_eps, sample_eps

    def coefficients(self, t: Tensor, like: Tensor) -> Coefficients:
        """The path's coefficients at `t` (N,), shaped to broadcast over `like` (N, ...)."""
        return coefficients(self.path, t.float().view(-1, *[1] * (like.ndim - 1)))

    def singular_ends(self) -> tuple[bool, bool]:
        """Whether the velocity derived from the prediction is singular at t = 0, and at t = 1."""
        return (
            self.path != "vp" and self.prediction != "velocity",
            self.path == "vp" or self.prediction != "velocity",
        )

    def checked(self, output: Tensor, like: Tensor) -> Tensor:
        """The denoiser's output in float32.

        Raises:
            ValueError: If its shape is not that of `like`.
        """
        if output.shape != like.shape:
            raise ValueError(
                f"The denoiser returned shape {tuple(output.shape)} for latents of shape "
                f"{tuple(like.shape)}; interpolants need an output of the latents' shape. Use a "
                "SiT, or a denoiser with learn_sigma=False."
            )
        return output.float()
