"""Models by name, in timm's manner."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

_FACTORIES: dict[str, Callable[..., nn.Module]] = {}
_ALIASES: dict[str, str] = {}


def register_model(
    name: str, factory: Callable[..., nn.Module], *, alias: str | None = None, **defaults: Any
) -> None:
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
        near = difflib.get_close_matches(
            name.lower().replace("/", "_").replace("-", "_"), _FACTORIES, n=4
        )
        raise ValueError(
            f"There is no model {name!r}. {'Did you mean ' + ', '.join(near) + '? ' if near else ''}"
            "tinyfusion_pl.models.list_models() gives all names."
        )
    return key


def model_family(name: str) -> Callable[..., nn.Module]:
    """The class (or function) that makes the model `name`."""
    return _FACTORIES[registered_name(name)].func


def model_defaults(name: str) -> dict[str, Any]:
    """The arguments that `name` stands for."""
    return dict(_FACTORIES[registered_name(name)].keywords)


def model_arguments(name: str) -> dict[str, inspect.Parameter]:
    """The arguments that the model `name` takes, those among them that its class passes on to the one that it is made from.

    Their defaults are those of the registered name.
    """
    factory, found = model_family(name), {}
    for each in factory.__mro__ if inspect.isclass(factory) else (factory,):
        function = vars(each).get("__init__") if inspect.isclass(each) else each
        if not inspect.isfunction(function):
            continue
        parameters = inspect.signature(function).parameters.values()
        for parameter in parameters:
            if (
                parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
                and parameter.name != "self"
            ):
                found.setdefault(parameter.name, parameter)
        if not any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters):
            break
    defaults = model_defaults(name)
    return {
        key: parameter.replace(default=defaults.get(key, parameter.default))
        for key, parameter in found.items()
    }


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
