"""Recovery losses: how the shallow student learns from the teacher."""

import warnings
from typing import Any

from tinyfusion_pl.distill.collecting import StudentOutputs, TeacherStates
from tinyfusion_pl.distill.depths import Depth, depths, interval_order, restore
from tinyfusion_pl.distill.distillation import Distillation
from tinyfusion_pl.distill.features import feature_loss, within_sigma
from tinyfusion_pl.distill.hidden_states import HiddenStates, float_tensors, in_backward, needs_grad
from tinyfusion_pl.distill.interval_losses import TeacherRuns, interval_loss, interval_losses
from tinyfusion_pl.distill.intervals import (
    Interval,
    check_single_blocks,
    get_intervals,
    resolve_intervals,
)
from tinyfusion_pl.distill.lift import lift_loss
from tinyfusion_pl.distill.outputs import output_loss, predictions
from tinyfusion_pl.distill.pairs import check_pairs, resolve_pairs
from tinyfusion_pl.distill.teacher import Teacher

__all__ = [
    "Depth",
    "Distillation",
    "HiddenStates",
    "Interval",
    "StudentOutputs",
    "Teacher",
    "TeacherRuns",
    "TeacherStates",
    "check_pairs",
    "check_single_blocks",
    "depths",
    "feature_loss",
    "float_tensors",
    "in_backward",
    "interval_loss",
    "interval_losses",
    "interval_order",
    "get_intervals",
    "lift_loss",
    "needs_grad",
    "output_loss",
    "predictions",
    "resolve_intervals",
    "resolve_pairs",
    "restore",
    "within_sigma",
]


def __getattr__(name: str) -> Any:
    """Names of the previous release."""
    if name != "intervals_of":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        f"{__name__}.intervals_of is deprecated; use {__name__}.get_intervals.",
        DeprecationWarning,
        stacklevel=2,
    )
    return get_intervals
