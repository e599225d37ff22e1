"""The linear layers of a model that can carry adapters."""

from __future__ import annotations

import functools
import inspect
from contextlib import suppress

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


def linear_names(model: nn.Module) -> list[str]:
    """Names of every linear layer of `model`, embedders and modulation included, those with the user's adapters too.

    Left out are those whose weight is read without a call of the layer (as by
    ``nn.MultiheadAttention``), and the output of Mamba's mixers, which fused kernels read.
    """
    modules = dict(model.named_modules())
    adapted = {name: m for name, m in modules.items() if isinstance(m, BaseTunerLayer)}
    inside = tuple(f"{name}." for name in adapted)

    def is_called(name: str) -> bool:
        owner, _, own = name.rpartition(".")
        return not reads_weight(modules[owner], own) and not (
            own == "out_proj" and hasattr(modules[owner], "A_log")
        )

    return [
        name
        for name, module in modules.items()
        if not name.startswith(inside)
        and _is_linear(adapted[name].get_base_layer() if name in adapted else module)
        and is_called(name)
    ]


def reads_weight(owner: nn.Module, name: str) -> bool:
    """Whether `owner` computes with the weight of its layer `name` and never calls the layer, by the code of its class."""
    source = _source(type(owner))
    return f"self.{name}.weight" in source and f"self.{name}(" not in source


@functools.cache
def _source(cls: type) -> str:
    sources = []
    for each in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        with suppress(OSError, TypeError):  # defined where there is no file
            sources.append(inspect.getsource(each))
    return "".join(sources)


def _is_linear(module: nn.Module) -> bool:
    """GPT-2 of transformers has a transposed kind of its own."""
    return (
        isinstance(module, nn.Linear)
        or type(module).__name__ == "Conv1D"
        and type(module).__module__.startswith("transformers.")
    )
