"""How much each block changes its hidden states: ShortGPT's block influence, and Flux.1-lite's mean squared change."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tinyfusion_pl.pruning.calls import Call, quiet
from tinyfusion_pl.pruning.gating import GatedForward
from tinyfusion_pl.selection.problem import Choice, Problem

Change = Callable[[Tensor, Tensor], Tensor]


class ShortGPT:
    """Keeps the blocks of the largest influence: 1 - mean cosine of a block's input and output.

    The mean is over tokens, samples and timesteps, and over the streams of a block; one-shot, all blocks from one pass of the dense model.
    (Men et al., ShortGPT, arXiv 2403.03853, equation 1.)

    Args:
        keep_last: Keep the last unit of each stack whatever its score, as the published code does.
    """

    name = "shortgpt"

    def __init__(self, *, keep_last: bool = False) -> None:
        self.keep_last = keep_last

    def __call__(self, problem: Problem) -> Choice:
        scores = unit_changes(problem, _one_minus_cosine)
        ranked = scores.clone()
        if self.keep_last:
            ranked[[problem.space.members(path)[-1] for path in problem.space.paths]] = float("inf")
        return Choice(problem.space.top(ranked), scores)


class FluxLite:
    """Keeps the blocks that change their hidden states most: mean of the squared difference of output and input.

    (Flux.1-lite, Freepik 2024, ranks the blocks of FLUX so.)
    """

    name = "flux_lite"

    def __call__(self, problem: Problem) -> Choice:
        scores = unit_changes(problem, lambda x, y: (y - x).square().mean())
        return Choice(problem.space.top(scores), scores)


def _one_minus_cosine(x: Tensor, y: Tensor) -> Tensor:
    return 1 - torch.nn.functional.cosine_similarity(x, y, dim=-1).mean()


@torch.no_grad()
def unit_changes(problem: Problem, change: Change) -> Tensor:
    """`change` of input and output of each unit on the fixed samples, averaged over its blocks and their streams. (num_units,)"""
    structures, space, found, handles = problem.structures, problem.space, {}, []
    calibration = problem.fixed

    def hook(gated: GatedForward):
        def after(block, args, kwargs, output) -> None:
            call = Call(gated.signature, args, kwargs)
            streams = gated.plan(call).streams
            y = streams.take(output)
            values = [change(call.tensors[name].float(), y[key].float()) for key, name in streams.inputs.items()]
            found.setdefault(space.members(gated.gates.path)[gated.unit], []).append(torch.stack(values).mean().double().cpu())
        return after  # fmt: skip

    try:
        for gated in structures.gates.gated_forwards:
            handles.append(gated.block.register_forward_hook(hook(gated), with_kwargs=True))
        with quiet(problem.model), structures.gates.bypass():
            calibration.target = problem.model(*calibration.args, **calibration.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    structures.num_block_runs += sum(space.num_blocks.values()) * calibration.num_samples
    if missing := [i for i in range(space.num_units) if i not in found]:
        raise ValueError(f"The units {missing} did not run in a call of {type(problem.model).__name__}, so they have no score.")
    return torch.stack([torch.stack(found[i]).mean() for i in range(space.num_units)])
