"""Representation distillation and its mask.

TinyFusion, section 3.4, "masked knowledge distillation".

Hidden states of trained diffusion transformers hold a few massive activations; matching them drowns
the rest. The masked loss leaves out what lies k standard deviations or more from the mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

FEATURE_MASKS = ("reference", "joint", "none")


def check_feature_mask(mask: str, num_sigma: float) -> None:
    """Raise a ValueError for an unknown kind of mask or a width that is not positive."""
    if mask not in FEATURE_MASKS:
        raise ValueError(
            f"The feature mask is {mask!r}; give one of {', '.join(map(repr, FEATURE_MASKS))}."
        )
    if not num_sigma > 0:
        raise ValueError(f"num_sigma is {num_sigma}; give a number > 0 (published: 2).")


def within_sigma(hidden: Tensor, num_sigma: float) -> Tensor:
    """True where |x - mean| < num_sigma * sigma: (N, ...) -> bool (N, ...).

    Mean and unbiased sigma of each sample over tokens and channels.
    """
    axes = tuple(range(1, hidden.ndim))
    sigma, mean = torch.std_mean(hidden.detach().float(), dim=axes, keepdim=True)
    return (hidden.detach() - mean).abs() < num_sigma * sigma


def feature_loss(
    student: Tensor, teacher: Tensor, *, mask: str = "reference", num_sigma: float = 2.0
) -> Tensor:
    """Mean square of the masked difference of two hidden states, per sample.

    Args:
        student: Hidden states (N, T, D).
        teacher: Hidden states of the same shape.
        mask: ``"reference"``: each side is zeroed by its own mask, so that where only one is masked
            the other still counts (what the published code does); ``"joint"``: a position masked on
            either side counts on neither (what the paper says); ``"none"``.
        num_sigma: Half width of the band that stays, in standard deviations, > 0.

    Returns:
        (N,): the mean over all positions, masked ones counted as zero.

    Raises:
        ValueError: for unequal shapes or an unknown mask.
    """
    check_feature_mask(mask, num_sigma)
    if student.shape != teacher.shape:
        raise ValueError(
            f"Hidden states of student {tuple(student.shape)} and teacher {tuple(teacher.shape)} "
            "differ in shape; representation distillation needs equal widths and token counts."
        )
    if mask == "none":
        difference = student - teacher
    else:
        keep_student, keep_teacher = (
            within_sigma(student, num_sigma),
            within_sigma(teacher, num_sigma),
        )
        if mask == "joint":
            keep_student = keep_teacher = keep_student & keep_teacher
        difference = student * keep_student - teacher * keep_teacher
    return difference.float().square().flatten(1).mean(1)
