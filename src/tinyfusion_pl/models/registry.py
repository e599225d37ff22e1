"""Models by name, as in timm, and the families that define them.

Every package under `tinyfusion_pl.models` that exports a ``FAMILY`` (`Family`) is found by
`discover_families`; nothing else has to know of it.
"""

from __future__ import annotations

import difflib
import fnmatch
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib import import_module
from typing import Any

from torch import nn

from tinyfusion_pl.models.family import Family, Published

_FACTORIES: dict[str, partial[nn.Module]] = {}
_ALIASES: dict[str, str] = {}
_FAMILIES: dict[type[nn.Module], Family] = {}
PUBLISHED: dict[str, Published] = {}
"""Published checkpoints of all families by file or repository name."""


def discover_families(paths: Iterable[str], prefix: str = "tinyfusion_pl.models.") -> None:
    """Import the packages in `paths` and register the ``FAMILY`` of those that export one."""
    for found in pkgutil.iter_modules(paths, prefix):
        if found.ispkg:
            family = getattr(import_module(found.name), "FAMILY", None)
            if family is not None:
                register_family(family)


def register_family(family: Family) -> None:
    """Register the sizes and published checkpoints of `family`."""
    _FAMILIES[family.model] = family
    PUBLISHED.update(family.published)
    for name, arguments in family.sizes.items():
        register_model(name, family.model, alias=family.published_names.get(name), **arguments)


def list_families() -> list[Family]:
    """All registered families."""
    return list(_FAMILIES.values())


def get_family(model: Callable[..., nn.Module]) -> Family | None:
    """The family of exactly this class; None for subclasses and unregistered classes."""
    return _FAMILIES.get(model) if isinstance(model, type) else None


def register_model(
    name: str, factory: Callable[..., nn.Module], *, alias: str | None = None, **defaults: Any
) -> None:
    """Register ``factory(**defaults)`` under `name` and under its published name `alias`."""
    _FACTORIES[name] = partial(factory, **defaults)
    if alias is not None:
        _ALIASES[alias.lower()] = name


def list_models(pattern: str = "*") -> list[str]:
    """Registered names that match `pattern` (shell wildcards), sorted."""
    return sorted(fnmatch.filter(_FACTORIES, pattern))


def registered_name(name: str) -> str:
    """Resolve a registered or published name to the registered one.

    Raises:
        ValueError: Unknown name; the message suggests close matches.
    """
    key = _ALIASES.get(name.lower(), name)
    if key not in _FACTORIES:
        near = difflib.get_close_matches(
            name.lower().replace("/", "_").replace("-", "_"), _FACTORIES, n=4
        )
        raise ValueError(
            f"Unknown model {name!r}. {'Did you mean ' + ', '.join(near) + '? ' if near else ''}"
            "tinyfusion_pl.models.list_models() lists all names."
        )
    return key


def model_class(name: str) -> Callable[..., nn.Module]:
    """The class or function that creates the model `name`."""
    return _FACTORIES[registered_name(name)].func


def model_defaults(name: str) -> dict[str, Any]:
    """The arguments that `name` implies."""
    return dict(_FACTORIES[registered_name(name)].keywords)


def model_arguments(name: str) -> Mapping[str, inspect.Parameter]:
    """All arguments of the model `name`, with the defaults that the name implies.

    Arguments that a class passes on to its base class (``**kwargs``) are included.
    """
    factory = model_class(name)
    found: dict[str, inspect.Parameter] = {}
    for each in factory.__mro__ if isinstance(factory, type) else (factory,):
        function = vars(each).get("__init__") if isinstance(each, type) else each
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
    """Create a randomly initialized model.

    Args:
        name: Registered or published name, see `list_models`.
        overrides: Arguments that replace those of the name, e.g. ``depth=14``.

    Raises:
        ValueError: Unknown name or argument.
    """
    key = registered_name(name)
    try:
        model = _FACTORIES[key](**overrides)
    except TypeError as error:
        raise ValueError(f"Model {name!r}: {error}.") from error
    vars(model)["model_name"] = key
    return model
