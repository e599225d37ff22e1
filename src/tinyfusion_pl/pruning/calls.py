"""One call of a block, its tensors by name, and running a module quietly to learn from it."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Values that cannot hold what a block remembers from one run to the next.
_IMMUTABLE = (
    type(None), bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device,
    torch.Size, torch.layout, torch.memory_format, range, slice, type, nn.Module, frozenset,
)  # fmt: skip


def map_tree(fn: Callable[[str, Any], Any], tree: Any, path: str = "") -> Any:
    """`tree` (nested tuples, lists, dicts) with `fn(path, leaf)` in place of each leaf."""
    if isinstance(tree, (tuple, list)) and not isinstance(tree, torch.Size):
        items = [map_tree(fn, item, f"{path}[{i}]") for i, item in enumerate(tree)]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    if type(tree) is dict:
        return {k: map_tree(fn, v, f"{path}[{k!r}]") for k, v in tree.items()}
    return fn(path, tree)


class Call:
    """The arguments of one call of a block.

    Attributes:
        tensors: Every tensor among the arguments, by name: that of the parameter it is given to,
            with its place in nested containers (``"image_rotary_emb[0]"``).
        remembering: Names of arguments that the block may change (a key-value cache).
        positional: Names of the positional arguments.
        leaves: Everything that containers among the arguments hold, tensors and others.
    """

    def __init__(
        self, signature: inspect.Signature | None, args: tuple, kwargs: dict[str, Any]
    ) -> None:
        self.args, self.kwargs = args, kwargs
        self.positional = _positional_names(signature, len(args))
        self._order = list(signature.parameters) if signature else []
        self.tensors: dict[str, Tensor] = {}
        self.remembering: list[str] = []
        self.leaves: list[Any] = []
        self._map(self._collect)

    def _map(self, fn: Callable[[str, Any], Any]) -> tuple[tuple, dict[str, Any]]:
        args = tuple(map_tree(fn, value, name) for name, value in zip(self.positional, self.args))
        return args, {name: map_tree(fn, value, name) for name, value in self.kwargs.items()}

    def _collect(self, name: str, leaf: Any) -> Any:
        self.leaves.append(leaf)
        if isinstance(leaf, Tensor):
            self.tensors[name] = leaf
        elif (
            not isinstance(leaf, _IMMUTABLE)
            and not inspect.isroutine(leaf)
            and not _is_partial(leaf)
        ):
            self.remembering.append(name)
        return leaf

    def replace(self, tensors: Mapping[str, Tensor]) -> tuple[tuple, dict[str, Any]]:
        """Positional and keyword arguments with these tensors in place of those of their names."""
        return self._map(
            lambda name, leaf: tensors.get(name, leaf) if isinstance(leaf, Tensor) else leaf
        )

    def value(self, name: str) -> Any:
        """The argument given to the parameter `name`; None where it was left out."""
        return {**dict(zip(self.positional, self.args)), **self.kwargs}.get(name)

    @property
    def parameters(self) -> list[str]:
        """Names of the parameters that were given something, in the order of the signature."""
        given = [*self.positional, *self.kwargs]
        return sorted(
            given, key=lambda n: self._order.index(n) if n in self._order else len(self._order)
        )

    def describe(self) -> str:
        """Names and shapes of the tensors, for messages."""
        return (
            ", ".join(f"{name} {tuple(t.shape)}" for name, t in self.tensors.items())
            or "no tensors"
        )


def block_signature(block: nn.Module) -> inspect.Signature | None:
    """Signature of the forward of `block`, seen through wrappers; None where it cannot be known."""
    try:
        return inspect.signature(type(unwrapped(block)).forward)
    except (TypeError, ValueError):  # not every callable can be looked into
        return None


def unwrapped(block: nn.Module) -> nn.Module:
    """The block inside `torch.compile`'s and the activation checkpointing wrapper."""
    for name in ("_orig_mod", "_checkpoint_wrapped_module"):
        if isinstance(inner := getattr(block, "_modules", {}).get(name), nn.Module):
            return unwrapped(inner)
    return block


def _positional_names(signature: inspect.Signature | None, num: int) -> list[str]:
    named, variadic = [], None
    for parameter in list(signature.parameters.values())[1:] if signature else []:  # without self
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            named.append(parameter.name)
        elif parameter.kind is parameter.VAR_POSITIONAL:
            variadic = parameter.name
    return [
        named[i] if i < len(named) else f"{variadic or 'args'}[{i - len(named)}]"
        for i in range(num)
    ]


def _is_partial(leaf: Any) -> bool:
    return callable(getattr(leaf, "func", None)) and hasattr(leaf, "keywords")


@contextmanager
def quiet(module: nn.Module, *, seed: int | None = None) -> Iterator[None]:
    """Without a graph, dropout or other randomness of `module`, leaving every generator untouched.

    Its modules are in evaluation mode inside (drop path, label dropout; batch statistics too) and
    torch's fused encoder path, which reads weights past their modules, is off.
    """
    training = [(m, m.training) for m in module.modules()]
    tensor = next(iter(module.parameters()), None)
    devices = [tensor.device] if tensor is not None and tensor.device.type == "cuda" else []
    fast, cached = torch.backends.mha.get_fastpath_enabled(), torch.is_autocast_cache_enabled()
    for each, _ in training:
        each.training = False  # not eval(): a model may have made more of train()
    torch.backends.mha.set_fastpath_enabled(False)
    torch.set_autocast_cache_enabled(
        False
    )  # its low-precision copies of weights would lack a graph later
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            if seed is not None:
                torch.manual_seed(seed)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch.set_autocast_cache_enabled(cached)
        for each, was in training:
            each.training = was
