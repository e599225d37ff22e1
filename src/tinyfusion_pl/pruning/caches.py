"""Caches and memories of language models, off while their blocks are gated."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

SETTINGS = ("use_cache", "use_mems_train", "use_mems_eval")


def turn_off_caches(model: nn.Module) -> dict[tuple[str, str], bool]:
    """Set ``config.use_cache`` and its like to False wherever a module has it: a block that runs twice would write its cache twice."""
    before = {}
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        for setting in SETTINGS:
            if not isinstance(config, Mapping) and getattr(config, setting, None) is True:
                before[name, setting] = True
                setattr(config, setting, False)
    return before


def restore_caches(model: nn.Module, before: Mapping[tuple[str, str], bool]) -> None:
    for (name, setting), value in before.items():
        setattr(model.get_submodule(name).config, setting, value)
