"""Weights that are shared out over processes (torch's FSDP2), and how to see them whole.

Each block is gathered when it is called, for the length of that call, forward and backward; so all
processes call it equally often. Gates keep to that: a `GatedForward` stands in for a block's
``forward``, inside the call that gathers, and may run it on any share of the samples, or on none.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from tinyfusion_pl.pruning.discovery import find_stacks


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Share out the weights of `model` over the processes of `mesh`, in place: block by block, then the rest.

    Args:
        model: The model; its optimizer is made afterwards.
        mesh: One-dimensional.

    Returns:
        `model`.
    """
    for stack in find_stacks(model).values():
        for block in stack:
            fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    """Whether weights of `model` are shared out."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def local(tensor: Tensor) -> Tensor:
    """This process's share of `tensor`, without a copy; of a plain tensor, itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of `tensor`; for a shared one, all processes must ask at the same time."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Inside, the weights of `module` are whole, so that its ``forward`` can be run by itself; all processes must take part."""
    shared = isinstance(module, FSDPModule) and is_sharded(module)
    if shared:
        module.unshard()
    try:
        yield
    finally:
        if shared:
            module.reshard()


@torch.no_grad()
def whole_copy(outline: nn.Module, model: nn.Module) -> nn.Module:
    """A plain copy of `model` on the CPU, which cannot be copied itself; all processes must take part.

    Args:
        outline: A copy of it from before its weights were shared out, without memory
            (`copy_to_meta`).
        model: The model; what it has beside the tensors of `outline` is left out.
    """
    copied = copy.deepcopy(outline)
    names = {
        name
        for name, _ in chain(
            copied.named_parameters(remove_duplicate=False),
            copied.named_buffers(remove_duplicate=False),
        )
    }
    values: dict[int, Tensor] = {}  # tied tensors stay tied
    for name, tensor in chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    ):
        if name in names:
            if id(tensor) not in values:
                value = whole(tensor.detach()).cpu().clone()
                values[id(tensor)] = (
                    nn.Parameter(value, tensor.requires_grad)
                    if isinstance(tensor, nn.Parameter)
                    else value
                )
            owner, _, own = name.rpartition(".")
            setattr(copied.get_submodule(owner), own, values[id(tensor)])
    return copied
