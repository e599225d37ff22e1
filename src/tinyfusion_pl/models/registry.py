"""Models by name, in timm's manner."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable
from typing import Any

from torch import nn

from tinyfusion_pl.models.dit import DiT

_FACTORIES: dict[str, Callable[..., nn.Module]] = {}
_ALIASES: dict[str, str] = {}


def register_model(name: str, factory: Callable[..., nn.Module], *, alias: str | None = None) -> None:
    """Add a model under `name`, and under `alias`, its published name."""
    _FACTORIES[name] = factory
    if alias is not None:
        _ALIASES[alias.lower()] = name


def list_models(pattern: str = "*") -> list[str]:
    """Names that match `pattern` (shell wildcards), sorted."""
    return sorted(fnmatch.filter(_FACTORIES, pattern))


def create_model(name: str, **overrides: Any) -> nn.Module:
    """A new model; `overrides` replace arguments, e.g. ``create_model("dit_xl_2", depth=14)``.

    Raises:
        ValueError: for an unknown name or argument; says which are near or allowed.
    """
    key = _ALIASES.get(name.lower(), name)
    if key not in _FACTORIES:
        near = difflib.get_close_matches(name.lower().replace("/", "_").replace("-", "_"), _FACTORIES, n=4)
        raise ValueError(f"There is no model {name!r}. {'Did you mean ' + ', '.join(near) + '? ' if near else ''}"
                         "tinyfusion_pl.models.list_models() gives all names.")
    try:
        model = _FACTORIES[key](**overrides)
    except TypeError as error:
        raise ValueError(f"Model {name!r}: {error}.") from error
    model.model_name = key
    return model


_SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16), "h": (1280, 32, 16)}


def _dit(size: str, patch_size: int) -> Callable[..., nn.Module]:
    hidden_size, depth, num_heads = _SIZES[size]
    defaults = {"hidden_size": hidden_size, "depth": depth, "num_heads": num_heads, "patch_size": patch_size}
    return lambda **overrides: DiT(**{**defaults, **overrides})


for _size in _SIZES:
    for _patch in (2, 4, 8):
        register_model(f"dit_{_size}_{_patch}", _dit(_size, _patch), alias=f"DiT-{_size.upper()}/{_patch}")

register_model("dit_digits", lambda **overrides: DiT(**{
    "input_size": 8, "patch_size": 2, "in_channels": 1, "hidden_size": 64, "depth": 12, "num_heads": 4, "num_classes": 10, **overrides}))
