"""Which arguments a block hands on, by the names in the return statements of its forward."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import nn

from tinyfusion_pl.pruning.calls import block_signature, unwrapped


def returned_names(
    block: nn.Module, keys: Sequence[Any], arguments: Collection[str]
) -> list[dict[Any, str]]:
    """A reading for each return statement with as many values as there are `keys`: output key -> name of one of the `arguments`.

    A block that returns what another module in it returns (``return self.block(x, context)``) is
    read as that one.
    """
    try:
        source = textwrap.dedent(inspect.getsource(type(block).forward))
        (function,) = ast.parse(source).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return []
    readings = []
    for node in _own_nodes(function):
        if not isinstance(node, ast.Return) or node.value is None:
            continue
        values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
        if isinstance(node.value, ast.Call):
            found = _of_inner(block, node.value, keys, arguments)
        elif isinstance(node.value, ast.Tuple) == (None in keys) or len(values) != len(keys):
            continue
        else:
            found = [{k: v.id for k, v in zip(keys, values) if isinstance(v, ast.Name)}]
        readings += [names for names in found if names and names not in readings]
    return readings


def _of_inner(
    block: nn.Module, call: ast.Call, keys: Sequence[Any], arguments: Collection[str]
) -> list[dict[Any, str]]:
    function = call.func
    if not (
        isinstance(function, ast.Attribute)
        and isinstance(function.value, ast.Name)
        and function.value.id == "self"
    ):
        return []
    inner = block._modules.get(function.attr)
    if inner is None or (signature := block_signature(inner)) is None:
        return []
    given: dict[str, str] = {}  # the inner module's parameter -> the name of this block's argument
    parameters = list(signature.parameters)[1:]  # without self
    if any(keyword.arg is None for keyword in call.keywords):  # **kwargs
        given |= {name: name for name in parameters}
    for name, argument in zip(parameters, call.args):
        if isinstance(argument, ast.Name):
            given[name] = argument.id
        elif isinstance(argument, ast.Starred) and isinstance(argument.value, ast.Name):
            rest = [
                (each, f"{argument.value.id}[{i}]")
                for i, each in enumerate(parameters[parameters.index(name) :])
            ]
            given |= {each: place for each, place in rest if place in arguments}
            break
    given |= {
        k.arg: k.value.id
        for k in call.keywords
        if k.arg is not None and isinstance(k.value, ast.Name)
    }
    readings = returned_names(unwrapped(inner), keys, given)
    return [
        {key: given[name] for key, name in reading.items() if name in given} for reading in readings
    ]


def _own_nodes(function: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function without those of functions inside it."""
    for node in ast.iter_child_nodes(function):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)):
            yield node
            yield from _own_nodes(node)
