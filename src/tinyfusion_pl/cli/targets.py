"""The parameters of a ``_target_``, with their type hints."""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from hydra.utils import get_object

SELF = ("self", "cls")
# Where a function passes its ``**kwargs``, if that does not depend on its arguments.
PASSED_ON = {
    "tinyfusion_pl.metrics.networks.TimmFeatures": "timm.create_model",
    "tinyfusion_pl.data.vae.load_vae": "tinyfusion_pl.data.VAE",
}


@dataclass(frozen=True)
class Parameters:
    """The parameters of a target.

    Attributes:
        hints: Name -> type hint.
        required: Names without a default.
        open: Whether other names are accepted (``**kwargs``).
    """

    hints: dict[str, Any]
    required: tuple[str, ...]
    open: bool


@lru_cache
def locate(target: str) -> Callable[..., Any]:
    """The class or function with a dotted name.

    Raises:
        ValueError: if there is none.
    """
    try:
        found = get_object(target)
    except Exception as error:  # of any type: importing the module runs its code
        raise ValueError(f"could not import {target!r} ({_reason(error)})") from error
    if not callable(found):
        raise ValueError(f"{target!r} is a {type(found).__name__}, not a class or function")
    return found


def get_parameters(target: Callable[..., Any], *, given: typing.Mapping[str, Any]) -> Parameters:
    """The parameters of `target` called with the arguments `given`."""
    return _merged([target, *_passed_on(target, given)])


def get_options(function: Callable[..., Any]) -> Parameters:
    """The keyword-only parameters of `function`."""
    parameters, known = _own(function)
    names = [
        name
        for name, parameter in parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    return Parameters({name: known.get(name, Any) for name in names}, (), False)


@lru_cache
def _own(function: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], dict[str, Any]]:
    """Parameters by name, and their hints; ``**kwargs`` for a builtin without a signature."""
    called: Callable[..., Any] = function
    if isinstance(function, type):
        called, new = (getattr(function, name) for name in ("__init__", "__new__"))
        if (called, new) == (object.__init__, object.__new__):
            return {}, {}  # object's signature has *args and **kwargs, but takes neither
    try:
        parameters = {
            name: p for name, p in inspect.signature(called).parameters.items() if name not in SELF
        }
    except (TypeError, ValueError):
        return {"kwargs": inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)}, {}
    return parameters, _hints(called, parameters)


def _hints(called: Callable[..., Any], parameters: dict[str, inspect.Parameter]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(called)
    except Exception:  # a name imported only for type checkers: evaluate each parameter
        pass
    names = vars(typing) | getattr(inspect.unwrap(called), "__globals__", {})
    # A dataclass's __init__ has globals of its own.
    names |= vars(sys.modules.get(called.__module__, typing))
    found = {}
    for name, parameter in parameters.items():
        try:
            hint = parameter.annotation
            found[name] = eval(hint, dict(names)) if isinstance(hint, str) else hint
        except Exception:
            found[name] = Any
    return found


def _passed_on(
    target: Callable[..., Any], given: typing.Mapping[str, Any]
) -> list[Callable[..., Any]]:
    """The functions to which `target` passes its ``**kwargs``."""
    name = f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')}"
    if name in PASSED_ON:
        return [locate(PASSED_ON[name])]
    if isinstance(target, type) and name.startswith("tinyfusion_pl."):  # others are unknown
        return [
            each for each in target.__mro__[1:] if "__init__" in vars(each) and each is not object
        ]
    if name == "tinyfusion_pl.models.pretrained.load_denoiser":
        from tinyfusion_pl.models.registry import model_class

        try:
            return [model_class(str(given.get("name")))]
        except Exception:  # reported when the name itself is checked
            return []
    return []


def _merged(functions: list[Callable[..., Any]]) -> Parameters:
    hints: dict[str, Any] = {}
    required: list[str] = []
    open_ = True
    for place, function in enumerate(functions):
        parameters, known = _own(function)
        open_ = False
        for name, parameter in parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                open_ = True
            elif parameter.kind is not inspect.Parameter.VAR_POSITIONAL and name not in hints:
                hints[name] = known.get(name, Any)
                if parameter.default is parameter.empty and place == 0:
                    required.append(name)
        if not open_:
            break
    return Parameters(hints, tuple(required), open_)


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
