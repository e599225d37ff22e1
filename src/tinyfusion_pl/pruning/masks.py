"""What is drawn for a batch: masks are a function of the batch, not of the forward pass.

`Masks.redraw` is called once at the start of each batch. The noise and the hard choice are then
kept without a graph, for each stack and batch size, and each block rebuilds its own column of the
mask from the gate logits and the noise. So any number of forward passes, and the recomputation of
activation checkpointing, see the masks of their batch; nothing is drawn inside a forward pass.

Two forward passes of equal batch size in one batch share their masks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tinyfusion_pl.pruning.assignment import Assignment
    from tinyfusion_pl.pruning.stack_gates import StackGates

# Odd 64-bit constants: distinct streams for equal seeds on different ranks, stacks and batch sizes.
_RANK_STRIDE, _STACK_STRIDE, _SIZE_STRIDE = (
    0x9E3779B97F4A7C15,
    0xD1B54A32D192ED03,
    0x8CB92BA72F3D8DD7,
)

Noise = Mapping[str, Sequence[Tensor]]


@dataclass
class Split:
    """Which samples keep a unit: index tensors on the model's device, None where all agree."""

    num_kept: int
    kept: Tensor | None = None
    dropped: Tensor | None = None


@dataclass
class _Drawn:
    """The draw of one stack for one batch size: noise of each group, and the hard choice."""

    noise: list[Tensor]
    splits: list[Split]
    versions: list[int]


class Masks:
    """The masks of the current batch, of every stack.

    Args:
        tau: Temperature of the Gumbel-softmax to start with, > 0.
        rank: Rank of this process: equally seeded processes still draw different masks.
    """

    def __init__(self, *, tau: float = 4.0, rank: int = 0) -> None:
        self.tau, self.rank = tau, rank
        self.generation = 0  # counts the draws, so that a backward pass can tell them apart
        self._fixed_noise: Noise | None = None
        self._forced: dict[str, set[int]] | None = None
        self.assignment: Assignment | None = None
        self.redraw()

    @property
    def tau(self) -> float:
        """Temperature of the Gumbel-softmax, > 0; takes effect at the next draw."""
        return self._tau

    @tau.setter
    def tau(self, value: float) -> None:
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"tau is {value}; give a number > 0 (published: from 4 to 0.1).")
        self._tau = float(value)

    def redraw(self) -> None:
        """Draw the masks of the next batch, seeded from the global generator (its only use)."""
        self._seed = int(torch.randint(2**62, ()))
        self._drawn: dict[tuple[str, int], _Drawn] = {}
        self._drawn_tau = self.tau
        self.generation += 1

    def fix_noise(self, noise: Noise | None) -> None:
        """Use this noise from now on: for each stack path a list of (N, K), one a group."""
        self._fixed_noise = None if noise is None else {p: list(each) for p, each in noise.items()}
        self.redraw()

    @property
    def is_forced(self) -> bool:
        """Whether `forced` holds."""
        return self._forced is not None

    @contextmanager
    def forced(self, kept_units: Mapping[str, Sequence[int]]) -> Iterator[None]:
        """Inside, every sample keeps exactly these units of each stack."""
        before, self._forced = self._forced, {p: set(units) for p, units in kept_units.items()}
        try:
            yield
        finally:
            self._forced = before

    @contextmanager
    def assigned(self, assignment: Assignment) -> Iterator[Assignment]:
        """Inside, for one forward pass without a graph, each row of the batch has the structure that `assignment` gives it."""
        self.assignment = assignment
        try:
            yield assignment
        finally:
            self.assignment = None

    def column(self, gates: StackGates, unit: int, num_samples: int) -> Tensor:
        """Mask of one unit (N,), exact zeros and ones, with the gradient of the soft choice."""
        if self._forced is not None:
            value = float(unit in self._forced[gates.path])
            return torch.full((num_samples,), value, dtype=torch.float32, device=gates.device)
        drawn = self._of(gates, num_samples)
        group = gates.get_group(unit)
        # Identity hooks: what sampling saves is not part of a checkpointed block, which it
        # outlives.
        with (
            torch.autograd.graph.saved_tensors_hooks(_same, _same),
            torch.autocast(gates.device.type, enabled=False),
        ):
            mask = gates.sample(group, self._drawn_tau, drawn.noise[group])
            return mask[:, unit - gates.groups[group].start]

    def split(self, gates: StackGates, unit: int, num_samples: int) -> Split:
        """The samples that keep and that drop the unit."""
        if self._forced is not None:
            return Split(num_samples if unit in self._forced[gates.path] else 0)
        return self._of(gates, num_samples).splits[unit]

    def _of(self, gates: StackGates, num_samples: int) -> _Drawn:
        key, versions = (gates.path, num_samples), [p._version for p in gates.logits]
        if key not in self._drawn:
            noise = self._noise(gates, num_samples)
            with torch.no_grad(), torch.autocast(gates.device.type, enabled=False):
                each = [gates.sample(i, self._drawn_tau, n) for i, n in enumerate(noise)]
            self._drawn[key] = _Drawn(noise, _split(torch.cat(each, 1)), versions)
        elif self._drawn[key].versions != versions:
            raise RuntimeError(
                "The gate logits have changed since the masks were drawn, so that the masks no "
                "longer belong to them. Call gates.redraw() at the start of each batch "
                "(DepthPruningCallback does it)."
            )
        return self._drawn[key]

    def _noise(self, gates: StackGates, num_samples: int) -> list[Tensor]:
        if self._fixed_noise is None:
            strides = (
                (self.rank, _RANK_STRIDE),
                (gates.index, _STACK_STRIDE),
                (num_samples, _SIZE_STRIDE),
            )
            seed = (self._seed + sum(n * stride for n, stride in strides)) % 2**63
            generator = torch.Generator().manual_seed(seed)
            noise = [d.noise(num_samples, generator=generator) for d in gates.distributions]
            return [n.to(gates.device, non_blocking=True) for n in noise]
        noise = self._fixed_noise[gates.path]
        expected = [(num_samples, d.num_logits) for d in gates.distributions]
        if [tuple(n.shape) for n in noise] != expected:
            raise ValueError(
                f"Fixed noise for '{gates.path}' has shapes {[tuple(n.shape) for n in noise]}; "
                f"expected {expected}."
            )
        return [n.to(gates.device) for n in noise]


def _split(mask: Tensor) -> list[Split]:
    """A `Split` for each column of `mask` (N, num_units): one transfer to the host and one back."""
    keeps = mask.t().to("cpu", torch.bool)  # (num_units, N)
    splits, parts = [Split(int(row.sum())) for row in keeps], []
    mixed = [(s, row) for s, row in zip(splits, keeps) if 0 < s.num_kept < len(row)]
    for _, row in mixed:
        parts += [row.nonzero().flatten(), (~row).nonzero().flatten()]
    if parts:
        whole = torch.cat(parts).to(mask.device, non_blocking=True)
        on_device = iter(whole.split([len(part) for part in parts]))
        for split, _ in mixed:
            split.kept, split.dropped = next(on_device), next(on_device)
    return splits


def _same(tensor: Tensor) -> Tensor:
    return tensor
