"""Caches of language models, off while their blocks are gated."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


def turn_off_caches(model: nn.Module) -> dict[str, bool]:
    """Set ``config.use_cache`` to False wherever a module has it: a block that runs twice would write its cache twice."""
    before = {}
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        if getattr(config, "use_cache", None) is True and not isinstance(config, Mapping):
            before[name], config.use_cache = True, False
    return before


def restore_caches(model: nn.Module, before: Mapping[str, bool]) -> None:
    for name, value in before.items():
        model.get_submodule(name).config.use_cache = value
