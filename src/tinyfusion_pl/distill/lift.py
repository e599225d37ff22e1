"""LIFT and PLACE: output distillation by lines through groups of elements.

arXiv 2605.19729.

The elements of a sample's channel are sorted by their squared error to the teacher and cut into
groups; of each group a least-squares line says how far the student is off as a whole (coarse), and
what is left of its elements (fine). While the lines are far from the identity, the fine term counts
little.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP_SIZE = 16
EPSILON = 1e-6


def check_group_size(group_size: int) -> None:
    """Raise a ValueError for groups through which no line can be laid."""
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 2:
        raise ValueError(
            f"group_size is {group_size!r}; give a count of elements >= 2 (published: "
            f"{GROUP_SIZE})."
        )


def lift_loss(
    student: Tensor, teacher: Tensor, *, group_size: int = GROUP_SIZE, channel_axis: int = 1
) -> Tensor:
    """Coarse and fine error of lines through groups of sorted elements, per sample.

    A line is ``teacher ~ slope * student + intercept``.

    Of each sample and channel, elements are sorted by squared error (ascending; the order has no
    gradient) and cut into groups. Then, in float32 or higher::

        slope = 1 + cov(student, teacher - student) / (var(student) + 1e-6)
        intercept = mean(teacher) - slope * mean(student)
        coarse = (slope - 1)^2 + intercept^2                          # mean over groups
        fine = (slope.detach() * student + intercept.detach() - teacher)^2   # mean over elements
        loss = coarse + (1 - min(1, mean |slope - 1| + mean |intercept|)).detach() * fine

    Two things differ from the published code. The means in the weight of the fine term are over the
    groups of one sample, where it takes those of the whole batch: the loss of a batch is then the
    mean of its samples' losses, however the batch is divided over processes and accumulation steps.
    And the slope is written by the residual, so that 1e-6 draws it towards 1 instead of 0: without
    that, equal outputs would have a loss, and so would any last group of one element. Where
    variances are far above 1e-6 both are the same number.

    Args:
        student: Predictions, (N, C, ...) with `channel_axis` 1, (N, T, C) with -1.
        teacher: Predictions of the same shape; they get no gradient.
        group_size: Elements of a group, >= 2 (published: 16); the last group of a channel may be
            smaller.
        channel_axis: The axis of the channels, not the first; all others but the first are the
            elements.

    Returns:
        (N,).

    Raises:
        ValueError: for unequal shapes, an axis that is not there, or channels of a single element,
            which there is nothing to sort of.
    """
    check_group_size(group_size)
    if student.shape != teacher.shape:
        raise ValueError(
            f"Predictions of student {tuple(student.shape)} and teacher {tuple(teacher.shape)} "
            "differ in shape."
        )
    if not -student.ndim < channel_axis < student.ndim or channel_axis == 0:
        raise ValueError(
            f"channel_axis is {channel_axis}, but the prediction has shape "
            f"{tuple(student.shape)}. Give the axis of its channels: 1 for (N, C, ...), -1 for "
            "(N, T, C)."
        )
    dtype = torch.promote_types(student.dtype, torch.float32)
    ours, theirs = (
        x.to(dtype).movedim(channel_axis, 1).flatten(2) if x.ndim > 2 else x.to(dtype)[..., None]
        for x in (student, teacher.detach())
    )  # (N, C, E)
    num_elements = ours.shape[-1]
    if num_elements < 2:
        raise ValueError(
            "LIFT sorts the elements of a channel, but a prediction of shape "
            f"{tuple(student.shape)} with channel_axis={channel_axis} has {num_elements}. Give "
            "the axis of its channels, or output_loss='mse'."
        )
    order = (ours.detach() - theirs).square().argsort(dim=-1, stable=True)
    ours, theirs = ours.gather(-1, order), theirs.gather(-1, order)
    num_whole = num_elements // group_size * group_size
    spans = ((0, num_whole, group_size), (num_whole, num_elements, num_elements - num_whole))
    lines = [
        _lines(*(x[..., start:stop].unflatten(-1, (-1, size)) for x in (ours, theirs)))
        for start, stop, size in spans
        if stop > start
    ]
    slopes, intercepts, squares = zip(*lines)
    off, intercept = (
        torch.cat(slopes, -1).flatten(1),
        torch.cat(intercepts, -1).flatten(1),
    )  # (N, C * G)
    coarse = (off.square() + intercept.square()).mean(1)
    fine = torch.cat([each.flatten(1) for each in squares], 1).mean(1)
    weight = 1 - (off.abs().mean(1) + intercept.abs().mean(1)).detach().clamp(max=1)
    return coarse + weight * fine


def _lines(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Slope - 1 and intercept (N, C, G), and squared errors, of groups (N, C, G, E)."""
    residual = teacher - student
    mean, shift = student.mean(-1, keepdim=True), residual.mean(-1, keepdim=True)
    centered = student - mean
    off = (centered * (residual - shift)).mean(-1, keepdim=True) / (
        centered.square().mean(-1, keepdim=True) + EPSILON
    )
    intercept = shift - off * mean  # mean(teacher) - slope * mean(student)
    squares = (off.detach() * student + intercept.detach() - residual).square()
    return off.squeeze(-1), intercept.squeeze(-1), squares
