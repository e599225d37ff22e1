"""Building models from files: counts and types are checked before memory is allocated."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion_pl.artifacts import ArtifactError
from tinyfusion_pl.models.detection import detect_family
from tinyfusion_pl.models.fitting import fit_weights, fitting_state
from tinyfusion_pl.models.notices import first_line
from tinyfusion_pl.models.registry import create_model, model_arguments

BUILD_ERRORS = (
    RuntimeError,
    OverflowError,
    ZeroDivisionError,
    MemoryError,
    IndexError,
    AttributeError,
    KeyError,
)


def build_model(
    name: str,
    arguments: Mapping[str, Any],
    state: Mapping[str, Tensor],
    where: str | Path,
    *,
    prepare: Callable[[nn.Module], nn.Module] | None = None,
) -> nn.Module:
    """Build the model `name` with the weights `state` from `where`, in evaluation mode.

    The model is built on the meta device first, so that wrong sizes raise before memory is
    allocated. `prepare` adds to the model, before the weights are loaded, what its arguments do not
    cover (linear maps).

    Raises:
        ValueError: The weights do not fit or belong to another family, or an argument is invalid.
        ArtifactError: More blocks than tensors, or the weights are all zero or not finite.
    """
    check_depths(arguments, state, where)
    prepare = prepare or (lambda model: model)
    outline = _outline(name, arguments, where)
    if outline is not None:
        outline = prepare(outline)
        found, expected = detect_family(state), detect_family(outline.state_dict())
        if found != expected and None not in (found, expected):
            raise ValueError(
                f"{where} holds weights of another family ({found}) than {name}'s ({expected}). "
                "Give a model of that family as name= (model.name=), or another checkpoint."
            )
        state = fitting_state(outline, state, where)
    return fit_weights(prepare(create_model(name, **arguments)), state, where, fresh=True).eval()


def check_depths(
    arguments: Mapping[str, Any], state: Mapping[str, Tensor], where: str | Path
) -> None:
    """Raise for more blocks than tensors: blocks take time and memory, even without weights."""
    for argument, value in arguments.items():
        if "depth" in argument and isinstance(value, (int, float)) and value > len(state):
            raise ArtifactError(
                f"{where} does not match {argument}={value}: it has {len(state)} tensors, "
                "fewer than blocks. Give the depth of the weights, or copy the file again."
            )


def _outline(name: str, arguments: Mapping[str, Any], where: str | Path) -> nn.Module | None:
    """The model on the meta device; None if it cannot be built there."""
    try:
        with torch.device("meta"):
            return create_model(name, **arguments)
    except NotImplementedError:
        return None
    except ValueError as error:
        raise ValueError(f"{where}: {first_line(error)}") from error
    except BUILD_ERRORS as error:
        if "meta" in str(error):
            return None
        said = ", ".join(f"{key}={value!r:.80}" for key, value in arguments.items())
        raise ArtifactError(
            f"{where}: cannot build {name} with {said} ({type(error).__name__}: "
            f"{first_line(error)})."
        ) from error


def check_arguments(name: str, arguments: Mapping[str, Any], where: str) -> None:
    """Check arguments from a file against the constructor of the model `name`.

    Args:
        name: Registered name.
        arguments: Arguments by name.
        where: File and field, e.g. ``"x/record.json: model.kwargs"``.

    Raises:
        ArtifactError: An argument is unknown or has the wrong type.
    """
    known = {
        key: _type_name(parameter.annotation) for key, parameter in model_arguments(name).items()
    }
    for argument, value in arguments.items():
        if argument not in known:
            raise ArtifactError(
                f"{where}.{argument} is not an argument of {name}; arguments: {', '.join(known)}. "
                "Install the version that wrote the file, or copy it again."
            )
        expected = known[argument]
        fits = {
            "int": type(value) is int and abs(value) < 2**31,
            "bool": isinstance(value, bool),
            "float": type(value) in (int, float) and math.isfinite(value),
        }.get(expected, True)
        if not fits:
            raise ArtifactError(
                f"{where}.{argument} is {value!r:.80}; expected {expected}. Copy the file again."
            )


def _type_name(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
