"""Recovery losses: what the shallow student learns from the teacher."""

from tinyfusion_pl.distill.distillation import Distillation, StudentOutputs, TeacherStates, output_loss, predictions
from tinyfusion_pl.distill.features import feature_loss, within_sigma
from tinyfusion_pl.distill.hidden_states import HiddenStates, float_tensors, in_backward, needs_grad
from tinyfusion_pl.distill.lift import lift_loss
from tinyfusion_pl.distill.pairs import check_pairs, resolve_pairs
from tinyfusion_pl.distill.teacher import Teacher

__all__ = [
    "Distillation", "HiddenStates", "StudentOutputs", "Teacher", "TeacherStates", "check_pairs", "feature_loss", "float_tensors",
    "in_backward", "lift_loss", "needs_grad", "output_loss", "predictions", "resolve_pairs", "within_sigma",
]  # fmt: skip
