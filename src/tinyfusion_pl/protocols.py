"""Types that `objectives`, `distill` and `selection` share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor, nn

Distance = Callable[[Tensor, Tensor], Tensor]
"""Per-sample distance (N,) between two predictions (N, C, ...), the student's and the teacher's."""

NoisedT = TypeVar("NoisedT")


def mean_square(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference of each sample: (N, ...) -> (N,)."""
    return (prediction - target).square().flatten(1).mean(1)


@dataclass
class Draw(Generic[NoisedT]):
    """One random draw of the noising process, shared by teacher and student.

    Call ``denoiser(draw.x_t, draw.t, y)``. An objective whose denoiser takes more than noised data
    puts all of it into `x_t`.

    Attributes:
        x0: Data (N, ...).
        x_t: Noised data (N, ...), or whatever the denoiser takes in its place.
        t: Times (N,).
        noise: Noise (N, ...).
    """

    x0: Tensor
    x_t: NoisedT
    t: Tensor
    noise: Tensor


class Denoises(Protocol):
    """A denoiser as samplers call it: ``denoiser(x, t, y)``; `num_classes` is the null label."""

    @property
    def num_classes(self) -> int:
        """Number of classes: labels are 0 to num_classes - 1."""
        ...

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, /) -> Tensor:
        """Predict from noised data (N, ...), times (N,) and labels (N,)."""
        ...


class Objective(Protocol):
    """A noising process with its loss, its distillation loss and its samplers."""

    def draw(self, x0: Tensor, *, t: Tensor | None = None, noise: Tensor | None = None) -> Draw:
        """Noise `x0` (N, ...) at random times, or at the given ones."""
        ...

    def losses(self, output: Tensor, draw: Draw) -> dict[str, Tensor]:
        """Per-sample (N,) "loss" and its terms for the denoiser's output at `draw`."""
        ...

    def distillation_losses(
        self,
        output: Tensor,
        teacher_output: Tensor,
        draw: Draw,
        *,
        distance: Distance = mean_square,
    ) -> dict[str, Tensor]:
        """Per-sample (N,) "loss_kd" and its terms for the student's output against the teacher's.

        `distance` compares the two predictions (N, C, ...), weighted as in `losses`. Anything that
        an output holds besides its prediction (a learned variance) has a term of its own, whatever
        the distance.
        """
        ...

    def check_fits(self, denoiser: nn.Module) -> None:
        """Raise ValueError for a denoiser that predicts something else, naming what fits."""
        ...

    def check_sampling(self, **options: Any) -> None:
        """Raise the ValueError or TypeError that `sample` would raise for these options."""
        ...

    def num_noises(self, **options: Any) -> int:
        """Number of noise tensors, each in the shape of `z`, that `sample` takes as ``noise=``."""
        ...

    def sample(self, denoiser: Denoises, z: Tensor, y: Tensor, **options: Any) -> Tensor:
        """Samples (N, ...) from noise `z` (N, ...) with labels `y` (N,)."""
        ...
