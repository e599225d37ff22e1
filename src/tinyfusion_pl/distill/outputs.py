"""What two models return, compared whatever holds the tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tinyfusion_pl.distill.hidden_states import float_tensors

_BY_THE_WAY = ("loss", "hidden_states", "attentions", "cross_attentions", "past_key_values")
"""What models of transformers return beside their prediction, where they are asked to."""


def output_loss(
    output: Any, teacher_output: Any, *, distance: Callable[[Tensor, Tensor], Tensor] | None = None
) -> Tensor:
    """Mean squared error of two models' outputs, in float32, averaged over tensors.

    Outputs are tensors, tuples, lists or `ModelOutput`.

    With `distance`, the mean of that in place of the squared error: tensors must then be batch
    first. Losses that the models computed themselves (tensors without axes) and `ModelOutput`'s
    records of single layers do not count.

    Raises:
        ValueError: when the outputs do not hold equal numbers of tensors of equal shapes.
    """
    ours, theirs = predictions(output), predictions(teacher_output)
    shapes = [[tuple(t.shape) for t in tensors] for tensors in (ours, theirs)]
    if not ours or shapes[0] != shapes[1]:
        raise ValueError(
            f"The student returns floating-point tensors of shapes {shapes[0]}, the teacher "
            f"{shapes[1]}. They must be equal and at least one: give a teacher of the student's "
            "class and widths."
        )
    distance = distance or (lambda s, t: (s - t).square())
    return torch.stack(
        [distance(s.float(), t.to(s.device).float()).mean() for s, t in zip(ours, theirs)]
    ).mean()


def predictions(output: Any) -> list[Tensor]:
    """The floating-point tensors in what a model returned that say what it predicts."""
    if isinstance(output, Mapping):
        output = {key: value for key, value in output.items() if key not in _BY_THE_WAY}
    return [tensor for tensor in float_tensors(output) if tensor.ndim]
