"""Models from what files state: counts and types are held against the tensors that are there before any memory is taken."""

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
    """The model `name` of `arguments`, with the weights `state` that came from `where`, in evaluation mode.

    `prepare` gives the model, before its weights, what its arguments do not say (linear maps). It is built without memory first: a depth
    or a width that the weights do not have is refused before it takes any.

    Raises:
        ValueError: the weights do not fit, or are another family's, or the arguments are none.
        ArtifactError: there are more blocks stated than tensors, or the weights are all zero or not finite.
    """
    check_depths(arguments, state, where)
    prepare = prepare or (lambda model: model)
    outline = _outline(name, arguments, where)
    if outline is not None:
        outline = prepare(outline)
        found, expected = detect_family(state), detect_family(outline.state_dict())
        if found != expected and None not in (found, expected):
            raise ValueError(
                f"{where} holds weights of another family ({found}) than {name}'s ({expected}). Give that family's model as "
                "name= (model.name=), or another checkpoint."
            )
        state = fitting_state(outline, state, where)
    return fit_weights(prepare(create_model(name, **arguments)), state, where, fresh=True).eval()


def check_depths(
    arguments: Mapping[str, Any], state: Mapping[str, Tensor], where: str | Path
) -> None:
    """Refuse more blocks than there are tensors: each takes time and memory, even without weights."""
    for argument, value in arguments.items():
        if "depth" in argument and isinstance(value, (int, float)) and value > len(state):
            raise ArtifactError(
                f"{where} does not go with {argument}={value}: it holds {len(state)} tensors, fewer than blocks. "
                "Give the depth that the weights have, or copy the file again."
            )


def _outline(name: str, arguments: Mapping[str, Any], where: str | Path) -> nn.Module | None:
    """The model on the meta device; None for one that cannot be built there."""
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
            f"{where}: no {name} can be built of {said} ({type(error).__name__}: {first_line(error)})."
        ) from error


def check_arguments(name: str, arguments: Mapping[str, Any], where: str) -> None:
    """Hold the arguments that a file states against the types that the constructor of the model `name` takes.

    Args:
        where: File and field, e.g. ``"x/record.json: model.kwargs"``.

    Raises:
        ArtifactError: names the argument.
    """
    known = {
        key: _type_name(parameter.annotation) for key, parameter in model_arguments(name).items()
    }
    for argument, value in arguments.items():
        if argument not in known:
            raise ArtifactError(
                f"{where}.{argument} is no argument of {name}; it has {', '.join(known)}. Install the "
                "version that the file "
                "was written with, or copy it again."
            )
        expected = known[argument]
        fits = {
            "int": type(value) is int and abs(value) < 2**31,
            "bool": isinstance(value, bool),
            "float": type(value) in (int, float) and math.isfinite(value),
        }.get(expected, True)
        if not fits:
            raise ArtifactError(
                f"{where}.{argument} is {value!r:.80}; {expected} was expected. Copy the file again."
            )


def _type_name(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
