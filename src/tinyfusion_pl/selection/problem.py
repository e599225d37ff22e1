"""What a criterion is given, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from tinyfusion_pl.selection.calibration import Calibration
from tinyfusion_pl.selection.progress import Progress
from tinyfusion_pl.selection.space import Space
from tinyfusion_pl.selection.structures import Structures

FIXED, SEARCH, TRIALS, CANDIDATES, HEALING, WIDTH = range(
    6
)  # samples and random numbers of one purpose are independent of others'


class Problem:
    """A model, its space of structures, and samples to compare them on.

    Args:
        structures: Runs the model, which is dense, trained, and left as it is.
        draw: Makes samples: called with their number, it draws them with the global generator,
            which is seeded around the call.
        num_samples: Samples of `fixed`.
        seed: Of all randomness: the same seed, the same choice.
        on_step: Called after each step of a search with its history so far, as `Choice.history`.
        progress: Where steps of a long choice are kept.
    """

    def __init__(
        self,
        structures: Structures,
        draw: Callable[[int], Calibration],
        *,
        num_samples: int = 128,
        seed: int = 0,
        on_step: Callable[[list[dict[str, Any]]], None] = lambda history: None,
        progress: Progress | None = None,
    ) -> None:
        self.on_step = on_step
        self.progress = progress or Progress()
        self.progress.start(structures)
        self.structures, self.num_samples, self.seed, self._draw = (
            structures,
            num_samples,
            seed,
            draw,
        )
        self._fixed: dict[int, Calibration] = {}

    @property
    def model(self) -> nn.Module:
        """The dense model."""
        return self.structures.model

    @property
    def space(self) -> Space:
        """The allowed structures."""
        return self.structures.space

    @property
    def fixed(self) -> Calibration:
        """The samples on which structures are scored, the same for all."""
        return self.samples(self.num_samples)

    def samples(self, num_samples: int) -> Calibration:
        """Fixed samples, another number of them."""
        if num_samples not in self._fixed:
            self._fixed[num_samples] = next(self.stream(num_samples, FIXED))
        return self._fixed[num_samples]

    def stream(self, num_samples: int, which: int, step: int = 0) -> Iterator[Calibration]:
        """Endless fresh samples from `step` on; streams of one purpose and size are equal."""
        while True:
            with self.seeded(which, num_samples, step):
                calibration = self._draw(num_samples)
            if calibration.num_samples != num_samples:
                raise ValueError(
                    f"{num_samples} samples were asked for, and draw gave "
                    f"{calibration.num_samples}. It must give as many as it is called with."
                )
            yield calibration
            step += 1

    @contextmanager
    def seeded(self, which: int, *numbers: int) -> Iterator[None]:
        """Seed the global generators for a purpose; restore them afterwards."""
        with torch.random.fork_rng(get_devices(self.model)):
            torch.manual_seed(compute_seed(self.seed, which, *numbers))
            yield

    def generator(self, which: int) -> torch.Generator:
        """Random numbers of a purpose."""
        return torch.Generator().manual_seed(compute_seed(self.seed, which))


@dataclass
class Choice:
    """What a criterion chose.

    Attributes:
        structure: The units that stay (num_units,) bool.
        scores: Its value of each unit, higher where the unit should stay (num_units,); None where
            it values structures only.
        theta: Log-odds of a learned distribution (num_units,); None where nothing was learned.
        considered: Structures that it found good, best first, for trials; the choice itself need
            not be among them.
        history: Of each step of a search: "step", mean "loss", the "structure" then, and its
            "theta".
    """

    structure: Tensor
    scores: Tensor | None = None
    theta: Tensor | None = None
    considered: Tensor | None = None
    history: list[dict[str, Any]] = field(default_factory=list)


class Criterion(Protocol):
    """Chooses which units stay. One file in ``criteria/``, one YAML in ``conf/pruning/``."""

    name: str

    def __call__(self, problem: Problem) -> Choice:
        """Choose; `problem.structures` counts what it costs."""


def compute_seed(*numbers: int) -> int:
    """A seed for `torch.manual_seed` that depends on each of `numbers`."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def get_devices(model: nn.Module) -> list[torch.device]:
    """The CUDA device of `model`, if any, for `torch.random.fork_rng`."""
    tensor = next(iter(model.parameters()), None)
    return [tensor.device] if tensor is not None and tensor.device.type == "cuda" else []
