"""Recovery losses: what the shallow student learns from the teacher."""

from tinyfusion_pl.distill.distillation import Distillation, check_pairs, collecting, output_loss
from tinyfusion_pl.distill.features import HiddenStates, feature_loss, float_tensors, within_sigma

__all__ = ["Distillation", "HiddenStates", "check_pairs", "collecting", "feature_loss", "float_tensors", "output_loss",
           "within_sigma"]
