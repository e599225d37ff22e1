"""Hidden states that some blocks of a model return, collected while it runs.

A block may carry several streams (text and image), return None for one of them (the last block of
SD3), or have its batch on axis 1 (``batch_first=False``). Where hidden states and batch are is
found as for gates: by name, and by running the block once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion_pl.pruning import get_stack
from tinyfusion_pl.pruning.batch_axes import plan_batch, shape_key
from tinyfusion_pl.pruning.calls import Call, block_signature, unwrapped
from tinyfusion_pl.pruning.sharding import gathered
from tinyfusion_pl.pruning.streams import Key, get_items


@dataclass(frozen=True)
class Layout:
    """Keys of the hidden states in a block's output (None for a tensor) and their batch axis."""

    keys: tuple[Key, ...]
    axis: int

    def take(self, output: Any) -> dict[Key, Tensor]:
        """The hidden states in `output`, batch first; without those that it has None for."""
        items = get_items(output)
        if len(self.keys) == len(items) == 1:  # a tensor, and a tuple with nothing but that
            return {self.keys[0]: next(iter(items.values())).movedim(self.axis, 0)}
        return {
            key: items[key].movedim(self.axis, 0)
            for key in self.keys
            if isinstance(items.get(key), Tensor)
        }


_LAYOUTS: weakref.WeakKeyDictionary[nn.Module, dict[tuple, Layout]] = weakref.WeakKeyDictionary()


def get_layout(
    block: nn.Module, call: Call, output: Any, *, given: Sequence[str] | None, name: str
) -> Layout:
    """Find the layout of a block's output.

    Runs the block a few times, once for each pattern of shapes.

    Raises:
        ValueError: when the hidden states, or their batch axis, cannot be told.
    """
    known = _LAYOUTS.setdefault(block, {})
    key = (tuple(given or ()), *shape_key(call))
    if key not in known:
        known[key] = _find_layout(unwrapped(block), call, output, given, name)
    return known[key]


def _find_layout(
    block: nn.Module, call: Call, output: Any, given: Sequence[str] | None, name: str
) -> Layout:
    try:
        with gathered(block):
            plan = plan_batch(
                block, block.forward, call, given=list(given) if given else None, name=name
            )
        return Layout(
            tuple(key for key in get_items(output) if key in plan.streams.inputs), plan.axis
        )
    except ValueError:
        # Not a block that could be dropped, because its hidden states change their shape; if there
        # is one of them, that is it.
        found = [
            key
            for key, item in get_items(output).items()
            if isinstance(item, Tensor) and item.is_floating_point()
        ]
        sequence_first = any(getattr(m, "batch_first", True) is False for m in block.modules())
        if given or len(found) != 1 or sequence_first:
            raise
        return Layout((found[0],), 0)


class _AroundCompiled:
    """Hooks around a block compiled with ``block.compile()``.

    Inside the compiled part, the first hooks would stay forever.
    """

    def __init__(
        self, block: nn.Module, before: Callable[..., Any] | None, after: Callable[..., Any] | None
    ) -> None:
        self.block, self.compiled, self.before, self.after = (
            block,
            block._compiled_call_impl,
            before,
            after,
        )
        block._compiled_call_impl = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.before is not None:
            self.before(self.block, args, kwargs)
        output = self.compiled(*args, **kwargs)
        found = None if self.after is None else self.after(self.block, args, kwargs, output)
        return output if found is None else found

    def remove(self) -> None:
        self.block._compiled_call_impl = self.compiled


def watch(
    block: nn.Module,
    *,
    before: Callable[..., Any] | None = None,
    after: Callable[..., Any] | None = None,
) -> Any:
    """Call `before` or `after` at each call of `block`.

    As ``before(block, args, kwargs)`` or ``after(block, args, kwargs, output)``.

    What `after` returns, where it is not None, takes the place of the output.

    Returns:
        A handle whose ``remove()`` ends it; handles of one block are removed last first.
    """
    if getattr(block, "_compiled_call_impl", None) is not None:
        return _AroundCompiled(block, before, after)
    if before is not None:
        return block.register_forward_pre_hook(before, with_kwargs=True)
    return block.register_forward_hook(after, with_kwargs=True)


class BlockOutputs:
    """Context manager that collects what some blocks of a stack return while a model runs.

    Attributes:
        found: Outputs by block; set it to an empty mapping before a further run. While it is None
            nothing is collected.
    """

    def __init__(self, model: nn.Module, path: str, blocks: Sequence[int]) -> None:
        stack = get_stack(model, path)
        if wrong := [index for index in blocks if not 0 <= index < len(stack)]:
            raise ValueError(
                f"Blocks {wrong} are not in '{path}', which has blocks 0..{len(stack) - 1}."
            )
        self.path, self.blocks = path, {index: stack[index] for index in blocks}
        self.found: dict[int, Any] | None = None

    def __enter__(self) -> dict[int, Any]:
        self.found = {}
        self.handles = [
            watch(block, after=self._hook(index)) for index, block in self.blocks.items()
        ]
        return self.found

    def __exit__(self, *exc: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _hook(self, index: int) -> Callable[..., Any]:
        @torch._dynamo.disable
        def collect(block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
            return self._collect(index, block, args, kwargs, output)

        return collect

    def _collect(
        self, index: int, block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any
    ) -> Any:
        if self.found is not None and not in_backward():
            self.found[index] = output


class HiddenStates(BlockOutputs):
    """Context manager that collects the hidden states of some blocks of a stack.

    A tensor for each block, or a tuple of them where its blocks carry several streams, in the order
    in which it returns them.

    Args:
        model: The model.
        path: Path of the stack.
        blocks: Places of the blocks.
        streams: Names of the blocks' arguments that are hidden states, where they cannot be found.

    Attributes:
        layouts: By block, where its output held them.

    Example::

        with HiddenStates(model, "blocks", [3, 7]) as hidden:
            model(x, t, y)
        hidden[7]  # (N, T, D)
    """

    def __init__(
        self,
        model: nn.Module,
        path: str,
        blocks: Sequence[int],
        *,
        streams: Sequence[str] | None = None,
    ) -> None:
        super().__init__(model, path, blocks)
        self.streams = streams
        self.layouts: dict[int, Layout] = {}

    def _collect(
        self, index: int, block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any
    ) -> None:
        if self.found is None or in_backward():
            return
        call, name = Call(block_signature(block), args, kwargs), f"{self.path}.{index}"
        self.layouts[index] = get_layout(block, call, output, given=self.streams, name=name)
        states = tuple(self.layouts[index].take(output).values())
        self.found[index] = states[0] if len(states) == 1 else states


def in_backward() -> bool:
    """Whether activation checkpointing is running a module again."""
    return torch._C._current_graph_task_id() != -1


def float_tensors(tree: Any) -> list[Tensor]:
    """The floating-point tensors in nested tuples, lists and mappings, in order.

    diffusers' `ModelOutput` is a mapping.
    """
    if isinstance(tree, Tensor):
        return [tree] if tree.is_floating_point() else []
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    return (
        [tensor for item in tree for tensor in float_tensors(item)]
        if isinstance(tree, (tuple, list))
        else []
    )


def needs_grad(tree: Any) -> bool:
    """Whether a tensor in `tree` requires a gradient.

    Among calls without a graph, only checkpointed ones receive such tensors.
    """
    return any(tensor.requires_grad for tensor in float_tensors(tree))
