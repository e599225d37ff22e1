"""Whether a state dict is a model's, key for key, before any of it is put in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from tinyfusion_pl.artifacts import ArtifactError
from tinyfusion_pl.models.notices import warn
from tinyfusion_pl.models.prefixes import NUM_NAMED, nearest_prefix, under_prefix


def fit_weights(
    model: nn.Module, state: Mapping[str, Tensor], where: str | Path, *, fresh: bool = False
) -> nn.Module:
    """`load_weights` of a state dict that came from `where`.

    Args:
        fresh: `model` was just initialised, so that a tensor which is zero in `state` and not in
            the model is suspicious.
    """
    state = fitting_state(model, state, where)
    own = model.state_dict()
    check_values({key: state[key] for key in own}, where)
    if fresh:
        _check_zeros(own, state, where)
    model.load_state_dict(state)
    return model


def fitting_state(
    model: nn.Module, state: Mapping[str, Tensor], where: str | Path
) -> dict[str, Tensor]:
    """`state` with the names that `model` has; the model may be on the meta device.

    Raises:
        ValueError: names missing and unexpected keys, and tensors of another shape or type.
    """
    own = model.state_dict()
    if state.keys() != own.keys():
        state = under_prefix(state, own, where)
    prefix = nearest_prefix(state, own) if own.keys().isdisjoint(state) else ""
    found = {key.removeprefix(prefix): value for key, value in state.items()}
    problems = {
        "missing": [f"{k} {tuple(own[k].shape)}" for k in own if k not in found],
        "unexpected": [f"{k} {tuple(found[k].shape)}" for k in found if k not in own],
        "of another shape": [
            f"{k} {tuple(found[k].shape)} instead of {tuple(own[k].shape)}"
            for k in own
            if k in found and found[k].shape != own[k].shape
        ],
        "of another type": [
            f"{k} {found[k].dtype} instead of {own[k].dtype}"
            for k in own
            if k in found and not _castable(found[k], own[k])
        ],
    }
    if any(problems.values()):
        said = "; ".join(
            f"{len(keys)} {what}: {', '.join(keys[:NUM_NAMED])}{', ...' if len(keys) > NUM_NAMED else ''}"
            for what, keys in problems.items()
            if keys
        )
        under = f" even under the prefix {prefix!r}" if prefix else ""
        raise ValueError(
            f"{where} does not fit {getattr(model, 'model_name', type(model).__name__)}{under}: {said}. "
            "Give the checkpoint of this model, or the model's own size and depth."
        )
    return found


def _castable(found: Tensor, own: Tensor) -> bool:
    """Between floating point types; integers in the place of weights are quantized ones, of which the scales are missing."""
    return (
        found.is_floating_point() == own.is_floating_point()
        and found.is_complex() == own.is_complex()
    )


def check_values(state: Mapping[str, Tensor], where: str | Path) -> None:
    """Refuse weights that no training leaves.

    Raises:
        ArtifactError: some are not finite, or all are zero. `ValueError` where they are from no
            file.
    """
    kind = ArtifactError if Path(where).exists() else ValueError
    wrong = [
        key
        for key, value in state.items()
        if (value.is_floating_point() or value.is_complex()) and not _is_finite(value)
    ]
    if wrong:
        raise kind(
            f"{where} holds weights that are not finite, in {len(wrong)} of {len(state)} tensors: {', '.join(wrong[:NUM_NAMED])}"
            f"{', ...' if len(wrong) > NUM_NAMED else ''}. Its training has diverged, or the file is damaged: give an earlier one."
        )
    if state and not any(_any(value) for value in state.values()):
        raise kind(
            f"{where} holds weights that are all zero: an average that was never updated, or a damaged file. Give other weights, "
            "e.g. weights=raw (model.weights=raw) where the file has them."
        )


def _check_zeros(own: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str | Path) -> None:
    """Single tensors may begin as zeros (adaLN-Zero); those that a model begins with as others do not become zeros."""
    begun = [key for key, value in own.items() if value.ndim > 1 and _any(value)]
    zero = [key for key in begun if not _any(state[key])]
    if zero and len(zero) == len([key for key in begun if not key.endswith("pos_embed")]):
        raise ArtifactError(
            f"{where} holds weights that are all zero, but for biases and fixed tables: an average that was never updated. "
            "Give other weights, e.g. weights=raw (model.weights=raw) where the file has them."
        )
    if zero:
        warn(
            f"{where}: {len(zero)} of {len(state)} tensors are all zero, which no training leaves: {', '.join(zero[:NUM_NAMED])}"
            f"{', ...' if len(zero) > NUM_NAMED else ''}."
        )


def _is_finite(value: Tensor) -> bool:
    return bool(torch.isfinite(value if value.element_size() > 1 else value.float()).all())


def _any(value: Tensor) -> bool:
    return bool(
        (
            value if value.element_size() > 1 or not value.is_floating_point() else value.float()
        ).any()
    )
