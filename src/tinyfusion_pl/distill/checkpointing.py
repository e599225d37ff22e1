"""Losses on tensors that are computed inside reentrant activation checkpointing.

It runs a module without a graph, and with one only in the backward pass. So a loss is computed on
leaves with the values of the first run. Their gradients are there before any block is run again
(the loss is younger than the blocks, and the engine takes the youngest first), and are added to the
gradients of what the second run returns.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tinyfusion_pl.distill.hidden_states import BlockOutputs, float_tensors, in_backward, needs_grad
from tinyfusion_pl.pruning.calls import map_tree


class LeafGradients:
    """Leaves that replace outputs of a first run until the second run takes their gradients."""

    def __init__(self) -> None:
        self._pending: defaultdict[Any, list[list[Tensor]]] = defaultdict(list)

    def stand_in(self, place: Any, output: Any) -> Any:
        """`output` with leaves in place of its floating-point tensors."""
        leaves: list[Tensor] = []

        def leaf(path: str, each: Any) -> Any:
            if not (isinstance(each, Tensor) and each.is_floating_point()):
                return each
            leaves.append(each.detach().requires_grad_())
            return leaves[-1]

        replaced = map_tree(leaf, output)
        self._pending[place].append(leaves)
        return replaced

    def add(self, place: Any, output: Any) -> Any:
        """Pass the gradients of the leaves to `output` of a second run; None if there are none."""
        waiting = self._pending.get(place)
        if not waiting:
            return None
        tensors = float_tensors(output)
        # Backward goes through several calls from the last to the first, unless a call has a
        # backward pass of its own.
        order = reversed(range(len(waiting)))
        which = next((i for i in order if _equal(waiting[i], tensors)), len(waiting) - 1)
        leaves = iter(waiting.pop(which))

        def with_gradient(path: str, each: Any) -> Any:
            return (
                _AddGradient.apply(each, next(leaves))
                if isinstance(each, Tensor) and each.is_floating_point()
                else each
            )

        return map_tree(with_gradient, output)

    def clear(self) -> None:
        """Forget the leaves that no second run came for."""
        self._pending.clear()


def _equal(leaves: list[Tensor], tensors: list[Tensor]) -> bool:
    return len(leaves) == len(tensors) and all(torch.equal(a, b) for a, b in zip(leaves, tensors))


class _AddGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, leaf: Tensor) -> Tensor:
        ctx.leaf = leaf
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return (g if ctx.leaf.grad is None else g + ctx.leaf.grad), None


class CheckpointedOutputs(BlockOutputs):
    """`BlockOutputs` with leaves where reentrant activation checkpointing leaves out the graph.

    Attributes:
        whole: Whether the call of the whole model is checkpointed.
    """

    def __init__(self, *args: Any, gradients: LeafGradients) -> None:
        super().__init__(*args)
        self.gradients, self.whole = gradients, False

    def _collect(
        self, index: int, block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any
    ) -> Any:
        if in_backward():
            return self.gradients.add((self.path, index), output)
        if self.found is not None:
            checkpointed = not torch.is_grad_enabled() and (
                self.whole or needs_grad([args, kwargs])
            )
            self.found[index] = (
                self.gradients.stand_in((self.path, index), output) if checkpointed else output
            )
        return None
