"""Copies of a model: whole ones, and outlines whose tensors have shapes, but no memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy of `model`; tensors of the last forward pass that modules keep (attention maps) lose their graph."""
    return copy.deepcopy(
        model, {id(t): t.detach().clone() for t in _kept_tensors(model) if not t.is_leaf}
    )


def copy_to_meta(model: nn.Module) -> nn.Module:
    """A copy of `model` on the meta device.

    Raises:
        ValueError: when `model` cannot be copied; says why.
    """
    memo: dict[int, Any] = {id(t): t.detach() for t in _kept_tensors(model) if not t.is_leaf}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = (
            nn.Parameter(empty, requires_grad=tensor.requires_grad)
            if isinstance(tensor, nn.Parameter)
            else empty
        )
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # whatever a foreign attribute raises
        raise ValueError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}), and the shallow model is a copy of it. Take the "
            "attribute that cannot be copied (a lock, an open file) out of it, or give its class a __deepcopy__."
        ) from error


def _kept_tensors(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        yield from _tensors_in(list(vars(module).values()))


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors_in(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors_in(item)
