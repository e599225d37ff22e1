"""Models by name, in timm's manner."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

_FACTORIES: dict[str, Callable[..., nn.Module]] = {}
_ALIASES: dict[str, str] = {}


def register_model(name: str, factory: Callable[..., nn.Module], *, alias: str | None = None, **defaults: Any) -> None:
    """Add a model under `name`, and under `alias`, its published name; it is ``factory(**defaults)`` unless told otherwise."""
    _FACTORIES[name] = partial(factory, **defaults)
    if alias is not None:
        _ALIASES[alias.lower()] = name


def list_models(pattern: str = "*") -> list[str]:
    """Names that match `pattern` (shell wildcards), sorted."""
    return sorted(fnmatch.filter(_FACTORIES, pattern))


def registered_name(name: str) -> str:
    """The name that `name`, a registered or a published one, is registered under.

    Raises:
        ValueError: for an unknown name; says which are near.
    """
    key = _ALIASES.get(name.lower(), name)
    if key not in _FACTORIES:
        near = difflib.get_close_matches(name.lower().replace("/", "_").replace("-", "_"), _FACTORIES, n=4)
        raise ValueError(f"There is no model {name!r}. {'Did you mean ' + ', '.join(near) + '? ' if near else ''}"
                         "tinyfusion_pl.models.list_models() gives all names.")
    return key


def model_family(name: str) -> Callable[..., nn.Module]:
    """The class (or function) that makes the model `name`."""
    return _FACTORIES[registered_name(name)].func


def model_defaults(name: str) -> dict[str, Any]:
    """The arguments that `name` stands for."""
    return dict(_FACTORIES[registered_name(name)].keywords)


def create_model(name: str, **overrides: Any) -> nn.Module:
    """A new model; `overrides` replace arguments, e.g. ``create_model("dit_xl_2", depth=14)``.

    Raises:
        ValueError: for an unknown name or argument; says which are near or allowed.
    """
    key = registered_name(name)
    try:
        model = _FACTORIES[key](**overrides)
    except TypeError as error:
        raise ValueError(f"Model {name!r}: {error}.") from error
    model.model_name = key
    return model
