"""What a block carries: the hidden states that go in and come out, found by name.

A block may carry one stream (hidden states) or several (image and text). A dropped block must hand
each of them on unchanged, in the order in which the block itself returns them. Where the streams
are is read, in this order, from: what the user says; diffusers' registry of transformer blocks;
the names in the block's return statement; one tensor in and its like out. Anything else is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion_pl.pruning.calls import Call, unwrapped
from tinyfusion_pl.pruning.return_statements import returned_names

Key = int | str | None  # place of a tensor in a block's output; None where the output is the tensor


@dataclass(frozen=True)
class Streams:
    """The streams of a block.

    Attributes:
        inputs: Where each stream comes in, by its place in the output: output key -> name of the
            argument (see `Call`).
        extras: Output keys of tensors that are no streams (attention weights); they pass through.
        template: An output with None at each stream, to be filled in.
    """

    inputs: Mapping[Key, str]
    extras: tuple[Key, ...]
    template: Any

    @property
    def names(self) -> list[str]:
        """Names of the arguments that are streams."""
        return list(self.inputs.values())

    def take(self, output: Any) -> dict[Key, Tensor]:
        """The streams in what the block returned."""
        found = get_items(output)
        return {key: found[key] for key in self.inputs}

    def put(self, streams: Mapping[Key, Tensor], output: Any = None) -> Any:
        """An output as the block returns it: `streams`, and the rest from `output`."""
        if None in streams:
            return streams[None]
        whole = self.template if output is None else output
        if isinstance(whole, Mapping):
            filled = {key: streams.get(key, value) for key, value in whole.items()}
            return filled if type(whole) is dict else type(whole)(**filled)
        values = [streams.get(i, value) for i, value in enumerate(whole)]
        return type(whole)(*values) if hasattr(whole, "_fields") else type(whole)(values)


def get_items(output: Any) -> dict[Key, Any]:
    """The items of a block's output by key; a tensor has the key None."""
    if isinstance(output, Mapping):
        return dict(output.items())
    if isinstance(output, (tuple, list)):
        return dict(enumerate(output))
    return {None: output}


def find_streams(
    block: nn.Module,
    call: Call,
    output: Any,
    *,
    given: Sequence[str] | None = None,
    name: str = "block",
) -> Streams:
    """The streams of `block`, from one call and what it returned.

    Args:
        block: The block; messages call it `name`.
        call: The call.
        output: What the block returned for it.
        given: Names of the arguments that are streams, in the order in which the block returns
            them, where the user says so.

    Raises:
        ValueError: when inputs and outputs cannot be matched; names them, and what would settle it.
    """
    inner, items = unwrapped(block), get_items(output)
    bare = None in items
    readings = [("streams=", _given(call, items, given, name))] if given else [
        ("diffusers' registry of transformer blocks", _registered(inner, items)),
        *((f"the return statement of {type(inner).__name__}", each) for each in returned_names(inner, list(items), call.tensors)),
    ]  # fmt: skip
    fitting = [
        (source, fit)
        for source, reading in readings
        if reading and (fit := _fit(reading, call, items))
    ]
    if not fitting and given:
        raise ValueError(
            _refusal(
                name,
                call,
                items,
                f"streams={list(given)} does not match: each must have its like out. ",
            )
        )
    if fitting:
        source = fitting[0][0]
        if len({tuple(fit.items()) for s, fit in fitting if s == source}) > 1:
            raise ValueError(
                _refusal(name, call, items, f"{source} allows more than one reading. ")
            )
        inputs = fitting[0][1]
    else:
        inputs = _alike(call, items, name)
    extras = tuple(key for key, item in items.items() if key not in inputs and _holds_tensor(item))
    others = [tensor for arg, tensor in call.tensors.items() if arg not in inputs.values()]
    if not given and any(_like(tensor, items[key]) for key in extras for tensor in others):
        raise ValueError(_refusal(name, call, items, "A further output is like a further input. "))
    template = None if bare else _blank(output, inputs)
    return Streams(inputs, extras, template)


def _given(call: Call, items: Mapping, given: Sequence[str], name: str) -> dict[Key, str]:
    if unknown := [
        each for each in given if each not in call.tensors and each not in call.parameters
    ]:
        raise ValueError(
            f"{name} is not given {unknown}. Its arguments are: {', '.join(call.parameters)}."
        )
    return dict(zip(items, given))


def _registered(block: nn.Module, items: Mapping) -> dict[Key, str] | None:
    if not type(block).__module__.startswith("diffusers."):
        return None
    try:
        from diffusers.hooks._helpers import TransformerBlockRegistry

        entry = TransformerBlockRegistry.get(type(block))
    except (
        ImportError,
        ValueError,
        AttributeError,
    ):  # an older diffusers, or a class it does not know
        return None
    places = {
        entry.return_hidden_states_index: getattr(
            entry, "hidden_states_argument_name", "hidden_states"
        ),
        entry.return_encoder_hidden_states_index: getattr(
            entry, "encoder_hidden_states_argument_name", "encoder_hidden_states"
        ),
    }
    places.pop(None, None)
    if None in items:
        return {None: places[0]} if places.keys() == {0} else None
    return places if places.keys() <= items.keys() else None


def _fit(reading: Mapping[Key, str], call: Call, items: Mapping) -> dict[Key, str]:
    """The part of `reading` that this call has; nothing where a tensor's like does not come out."""
    pairs = {
        key: arg
        for key, arg in reading.items()
        if isinstance(items.get(key), Tensor) and arg in call.tensors
    }
    return pairs if all(_like(call.tensors[arg], items[key]) for key, arg in pairs.items()) else {}


def _alike(call: Call, items: Mapping, name: str) -> dict[Key, str]:
    """The first argument, and the first output, which must be like it; or all of a tuple or mapping."""
    first = call.parameters[0] if call.parameters else None
    members = [n for n in call.tensors if n == first or n.startswith(f"{first}[")]
    outs = {key: item for key, item in items.items() if isinstance(item, Tensor)}
    if len(members) > 1 and len(outs) == len(members) == len(items):  # a tuple in, a tuple out
        pairs = dict(zip(outs, members))
        if all(_like(call.tensors[arg], outs[key]) for key, arg in pairs.items()):
            return pairs
    if any(isinstance(key, str) for key in items):  # a mapping
        if pairs := {
            k: k for k, out in outs.items() if k in call.tensors and _like(call.tensors[k], out)
        }:
            return pairs
    key = next(iter(items), None)
    if len(members) == 1 and key in outs and _like(call.tensors[members[0]], outs[key]):
        return {key: members[0]}
    alike = [n for n, tensor in call.tensors.items() if _like(tensor, items.get(key))]
    if len(alike) == 1 and not members:
        return {key: alike[0]}
    raise ValueError(_refusal(name, call, items, ""))


def _like(a: Tensor, b: Any) -> bool:
    floating = a.is_floating_point() or a.is_complex()
    return (
        isinstance(b, Tensor)
        and a.shape == b.shape
        and floating == (b.is_floating_point() or b.is_complex())
    )


def _refusal(name: str, call: Call, items: Mapping, what: str) -> str:
    outs = ", ".join(
        f"{'output' if k is None else f'output[{k!r}]'} {tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__}"
        for k, v in items.items()
    )
    start = f"{name}: cannot tell which outputs carry on which inputs. {what}It takes {call.describe()}; it returns {outs}. "
    alike = [
        n for n, tensor in call.tensors.items() if any(_like(tensor, out) for out in items.values())
    ]
    if not alike:
        return f"{start}A block that can be dropped returns hidden states of the shapes that it takes; prune a list of such blocks."
    stack = name.rpartition(".")[0] or "blocks"
    return (f"{start}Name the arguments that are hidden states, in the order in which the block returns them, e.g. "
            f"streams={{{stack!r}: {alike}}}.")  # fmt: skip


def _blank(output: Any, inputs: Mapping) -> Any:
    if isinstance(output, Mapping):
        filled = {key: None if key in inputs else value for key, value in output.items()}
        return filled if type(output) is dict else type(output)(**filled)
    values = [None if i in inputs else value for i, value in enumerate(output)]
    values = [None if _holds_tensor(value) else value for value in values]
    return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)


def _holds_tensor(item: Any) -> bool:
    if isinstance(item, (tuple, list)):
        return any(map(_holds_tensor, item))
    if isinstance(item, Mapping):
        return any(map(_holds_tensor, item.values()))
    return isinstance(item, torch.Tensor)
