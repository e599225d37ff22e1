"""Gates on models that ``torch.compile`` has wrapped.

Masks change with every batch, so gates must never be traced. While they are on, everything compiled
on the way to a gated block (the model, a list, the block) runs eagerly, and the block itself is
compiled, with the settings that the user gave: one graph serves all blocks of a class, so that it
takes a fraction of the time of compiling the whole model. `close` gives the wrappers back.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion_pl.pruning.blocks import split_path

Opened = list[tuple[nn.Module, "Compiler"]]


class Compiler:
    """Compiles functions with the settings of an earlier call of ``torch.compile``.

    Args:
        context: What ``torch.compile`` keeps them in (``OptimizedModule.dynamo_ctx``).
    """

    def __init__(self, context: Any) -> None:
        self.context = context

    def __call__(self, function: Callable) -> Callable:
        return self.context(function)

    def __deepcopy__(self, memo: dict) -> Compiler:
        return self

    @property
    def is_static(self) -> bool:
        """Whether each size of batch would be compiled anew (``dynamic=False``)."""
        return getattr(self.context, "_dynamic", None) is False


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compile each of `blocks` by itself, whole: a graph break in one raises an error when it is first called.

    Names of parameters stay, and a copy of a block is not compiled.
    """
    for block in blocks:
        block.compile(fullgraph=True)


def uncompile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Undo `compile_blocks`."""
    for block in blocks:
        block._compiled_call_impl = None


def mark_batch(tensors: Mapping[str, Tensor], axes: Mapping[str, int]) -> None:
    """Tell ``torch.compile`` that the batch axes of `tensors` vary, before it learns so by compiling again."""
    for name, axis in axes.items():
        if tensors[name].shape[axis] > 1:
            torch._dynamo.maybe_mark_dynamic(tensors[name], axis)


def get_compiler(module: nn.Module) -> Compiler | None:
    """The compiler of a module that ``torch.compile(module)`` made or ``module.compile()`` compiled in place."""
    if "_orig_mod" in module._modules:
        return Compiler(module.dynamo_ctx)
    if (function := module.__dict__.get("_compiled_call_impl")) is not None:
        context = inspect.getclosurevars(function).nonlocals.get("self")
        return Compiler(context if callable(context) else torch.compile)
    return None


def open_compiled(modules: Iterable[nn.Module], opened: Opened) -> Compiler | None:
    """Let `modules` run eagerly.

    Args:
        modules: Outer ones first.
        opened: Gets each that was compiled, with its compiler; those in it already count as
            compiled.

    Returns:
        The compiler of the innermost compiled one; None where none is.
    """
    innermost = None
    for module in modules:
        known = next((compiler for each, compiler in opened if each is module), None)
        if (compiler := None if known and _is_open(module) else get_compiler(module)) is not None:
            if "_orig_mod" in module._modules:
                module.forward = module._orig_mod.__call__
            else:
                module._compiled_call_impl = None
            if known is None:
                opened.append((module, compiler))
        innermost = compiler or known or innermost
    return innermost


def close_compiled(opened: Opened) -> None:
    """Undo `open_compiled`."""
    for module, compiler in opened:
        if "_orig_mod" in module._modules:
            module._initialize()
        else:
            module._compiled_call_impl = compiler(module._call_impl)
    opened.clear()


def _is_open(module: nn.Module) -> bool:
    if "_orig_mod" in module._modules:
        return getattr(module.__dict__.get("forward"), "__self__", None) is module._orig_mod
    return module.__dict__.get("_compiled_call_impl") is None


def on_the_way(module: nn.Module, path: str) -> Iterator[nn.Module]:
    """`module` and every module on the way to the one at `path`, it included; wrappers of ``torch.compile`` and what they wrap too."""
    yield from _with_inner(module)
    for name in filter(None, path.split(".")):
        module = _innermost(module)._modules[name]
        yield from _with_inner(module)


def ways_to_stack(module: nn.Module, path: str) -> list[nn.Module]:
    """Every module on the way to the lists of the stack at `path` (see `get_stack`), outer ones first."""
    owner, names = split_path(path)
    seen: dict[int, nn.Module] = {}
    for name in names.split("+"):
        seen |= {id(m): m for m in on_the_way(module, f"{owner}.{name}")}
    return list(seen.values())


def _with_inner(module: nn.Module) -> Iterator[nn.Module]:
    yield module
    while (module := module._modules.get("_orig_mod")) is not None:
        yield module


def _innermost(module: nn.Module) -> nn.Module:
    *_, inner = _with_inner(module)
    return inner


def uncompiled(model: nn.Module) -> nn.Module:
    """`model` itself, without any wrapper of ``torch.compile`` on it or in it, changed in place."""
    model = _innermost(model)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and "_orig_mod" in child._modules:
                parent._modules[name] = _innermost(child)
        parent._compiled_call_impl = None
    return model
