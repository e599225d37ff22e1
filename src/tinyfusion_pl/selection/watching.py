"""The hidden states of every gated block in one forward pass of the dense model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion_pl.pruning.calls import Call, quiet
from tinyfusion_pl.pruning.gating import GatedForward
from tinyfusion_pl.pruning.streams import Key
from tinyfusion_pl.selection.problem import Problem

Watch = Callable[[GatedForward, Mapping[Key, Tensor], Mapping[Key, Tensor]], None]
"""Called with a block and the inputs and outputs of each of its streams."""


@torch.no_grad()
def watch_blocks(problem: Problem, watch: Watch) -> None:
    """Run the dense model on the fixed samples, calling `watch` once after each block.

    The model's output becomes the target of the samples; the pass is counted in `num_block_runs`.

    Raises:
        ValueError: where a unit did not run.
    """
    structures, space, calibration = problem.structures, problem.space, problem.fixed
    handles, seen = [], set()

    def hook(gated: GatedForward) -> Callable[..., None]:
        def after(block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            call = Call(gated.signature, args, kwargs)
            streams = gated.plan(call).streams
            seen.add(space.members(gated.gates.path)[gated.unit])
            inputs = {key: call.tensors[name] for key, name in streams.inputs.items()}
            watch(gated, inputs, streams.take(output))

        return after

    try:
        for gated in structures.gates.gated_forwards:
            handles.append(gated.block.register_forward_hook(hook(gated), with_kwargs=True))
        with quiet(problem.model), structures.gates.bypass():
            calibration.target = problem.model(*calibration.args, **calibration.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    structures.num_block_runs += sum(space.num_blocks.values()) * calibration.num_samples
    if missing := sorted(set(range(space.num_units)) - seen):
        model = type(problem.model).__name__
        raise ValueError(
            f"The units {missing} did not run in a call of {model}, so they have no score."
        )
