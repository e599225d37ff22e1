"""Change of hidden states by each block: ShortGPT and Flux.1-lite."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tinyfusion_pl.pruning.gating import GatedForward
from tinyfusion_pl.pruning.streams import Key
from tinyfusion_pl.selection.problem import Choice, Problem
from tinyfusion_pl.selection.watching import watch_blocks

Change = Callable[[Tensor, Tensor], Tensor]


class ShortGPT:
    """Keeps the blocks of the largest influence: 1 - mean cosine of a block's input and output.

    The mean is over tokens, samples and timesteps, and over the streams of a block; one-shot, all
    blocks from one pass of the dense model. (Men et al., ShortGPT, arXiv 2403.03853, equation 1.)

    Args:
        keep_last: Keep the last unit of each stack whatever its score, as the published code does.
    """

    name = "shortgpt"

    def __init__(self, *, keep_last: bool = False) -> None:
        self.keep_last = keep_last

    def __call__(self, problem: Problem) -> Choice:
        """Choose the units that stay."""
        scores = unit_changes(problem, _one_minus_cosine)
        ranked = scores.clone()
        if self.keep_last:
            ranked[[problem.space.members(path)[-1] for path in problem.space.paths]] = float("inf")
        return Choice(problem.space.top(ranked), scores)


class FluxLite:
    """Keeps the blocks with the largest mean squared change of their hidden states.

    (Flux.1-lite, Freepik 2024, ranks the blocks of FLUX so.)
    """

    name = "flux_lite"

    def __call__(self, problem: Problem) -> Choice:
        """Choose the units that stay."""
        scores = unit_changes(problem, lambda x, y: (y - x).square().mean())
        return Choice(problem.space.top(scores), scores)


def _one_minus_cosine(x: Tensor, y: Tensor) -> Tensor:
    return 1 - torch.nn.functional.cosine_similarity(x, y, dim=-1).mean()


def unit_changes(problem: Problem, change: Change) -> Tensor:
    """Mean change of each unit on the fixed samples: (num_units,).

    Averaged over its blocks and their streams.
    """
    found: dict[int, list[Tensor]] = {}

    def watch(
        gated: GatedForward, inputs: Mapping[Key, Tensor], outputs: Mapping[Key, Tensor]
    ) -> None:
        values = [change(x.float(), outputs[key].float()) for key, x in inputs.items()]
        unit = problem.space.members(gated.gates.path)[gated.unit]
        found.setdefault(unit, []).append(torch.stack(values).mean().double().cpu())

    watch_blocks(problem, watch)
    return torch.stack([torch.stack(found[i]).mean() for i in range(problem.space.num_units)])
