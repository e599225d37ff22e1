"""What training modules and samplers need of an objective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

Distance = Callable[[Tensor, Tensor], Tensor]
"""Per-sample distance (N,) of two predictions (N, C, ...), the student's and the teacher's."""


def mean_square(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference of each sample: (N, ...) -> (N,)."""
    return (prediction - target).square().flatten(1).mean(1)


@dataclass
class Draw:
    """One random draw of the noising process, shared by teacher and student: data, noised data (N, ...), time (N,), noise (N, ...).

    ``denoiser(draw.x_t, draw.t, y)`` is how it is used; an objective whose denoiser takes more than noised data puts that into `x_t`.
    """

    x0: Tensor
    x_t: Tensor
    t: Tensor
    noise: Tensor


class Objective(Protocol):
    """A noising process with its loss, its distillation loss in its own prediction space, and its samplers."""

    def draw(self, x0: Tensor, *, t: Tensor | None = None, noise: Tensor | None = None) -> Draw:
        """Noise `x0` (N, ...) at random times, or at those given."""

    def losses(self, output: Tensor, draw: Draw) -> dict[str, Tensor]:
        """Per-sample (N,) "loss" and its terms for the denoiser's `output` at ``(draw.x_t, draw.t)``."""

    def distillation_losses(
        self,
        output: Tensor,
        teacher_output: Tensor,
        draw: Draw,
        *,
        distance: Distance = mean_square,
    ) -> dict[str, Tensor]:
        """Per-sample (N,) "loss_kd" and its terms for the student's output against the teacher's.

        `distance` compares the two predictions (N, C, ...), weighted as in `losses`. What an output says beside its prediction (a learned
        variance) has a term of its own, whatever the distance.
        """

    def check_fits(self, denoiser: nn.Module) -> None:
        """Raise ValueError for a denoiser whose prediction is of another kind; says which objective or model is meant."""

    def check_sampling(self, **options: Any) -> None:
        """Raise ValueError for options that `sample` would refuse, and TypeError for those it does not know."""

    def num_noises(self, **options: Any) -> int:
        """How many noise tensors of the shape of `z` a `sample` with these options draws; given as ``noise=`` they fix it."""

    def sample(self, denoiser: nn.Module, z: Tensor, y: Tensor, **options: Any) -> Tensor:
        """Samples (N, ...) from noise `z` (N, ...) with labels `y` (N,)."""


def check_channels(denoiser: nn.Module, *, expected: int, objective: str) -> None:
    """`ValueError` unless a `Denoiser` predicts for each channel of its latents `expected` ones; of others nothing is known."""
    config, name = (
        getattr(denoiser, "config", {}),
        getattr(denoiser, "model_name", type(denoiser).__name__),
    )
    if "in_channels" not in config or not hasattr(denoiser, "out_channels"):
        return
    found = f"{denoiser.out_channels} channels" if denoiser.out_channels else "masked tokens"
    if denoiser.out_channels != (wanted := expected * config["in_channels"]):
        raise ValueError(
            f"{name} predicts {found} of latents of {config['in_channels']}, but {objective} needs {wanted} channels. Give "
            "the objective that goes with it: objective=gaussian_diffusion for DiT and U-DiT, sit for SiT, mar for MAR, noise "
            "for U-ViT; or learn_sigma alike in both."
        )
