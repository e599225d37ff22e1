"""What a ``_target_`` takes: the parameters of a class or function, with their type hints."""

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
# Where the ``**kwargs`` of a function go, as far as that does not depend on its arguments
PASSED_ON = {
    "tinyfusion_pl.metrics.networks.TimmFeatures": "timm.create_model",
    "tinyfusion_pl.data.vae.load_vae": "tinyfusion_pl.data.VAE",
}


@dataclass(frozen=True)
class Parameters:
    """Of a target: name -> hint, the names without a default, and whether names beyond these are taken."""

    hints: dict[str, Any]
    required: tuple[str, ...]
    open: bool


@lru_cache
def locate(target: str) -> Callable[..., Any]:
    """The class or function of a dotted name.

    Raises:
        ValueError: when there is none.
    """
    try:
        found = get_object(target)
    except Exception as error:  # of many types, also from the import of the module that is named
        raise ValueError(f"there is no {target!r} to import ({_reason(error)})") from error
    if not callable(found):
        raise ValueError(f"{target!r} is a {type(found).__name__}, no class or function")
    return found


def get_parameters(target: Callable[..., Any], *, given: typing.Mapping[str, Any]) -> Parameters:
    """The parameters of `target`; `given` are the arguments, which may decide where the others go."""
    return _merged([target, *_passed_on(target, given)])


def get_options(function: Callable[..., Any]) -> Parameters:
    """The parameters of `function` that are given by name alone."""
    parameters, known = _own(function)
    names = [
        name
        for name, parameter in parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    return Parameters({name: known.get(name, Any) for name in names}, (), False)


@lru_cache
def _own(function: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], dict[str, Any]]:
    """Parameters by name, and their hints; none where a builtin does not say them."""
    if isinstance(function, type) and (function.__init__, function.__new__) == (
        object.__init__,
        object.__new__,
    ):
        return {}, {}  # object's own says *args, **kwargs, and takes none
    called = function.__init__ if isinstance(function, type) else function
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
    except Exception:  # a name that is only imported for type checkers: each parameter by itself
        pass
    names = vars(typing) | getattr(inspect.unwrap(called), "__globals__", {})
    names |= vars(
        sys.modules.get(called.__module__, typing)
    )  # of a dataclass's __init__, which has globals of its own
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
    """Where the ``**kwargs`` of `target` go."""
    name = f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')}"
    if name in PASSED_ON:
        return [locate(PASSED_ON[name])]
    if isinstance(target, type) and name.startswith(
        "tinyfusion_pl."
    ):  # those of others may go anywhere
        return [
            each for each in target.__mro__[1:] if "__init__" in vars(each) and each is not object
        ]
    if name == "tinyfusion_pl.models.pretrained.load_denoiser":
        from tinyfusion_pl.models.registry import model_class

        try:
            return [model_class(given.get("name"))]
        except Exception:  # said where the name itself is looked at
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
