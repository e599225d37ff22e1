"""Recovery losses: what the shallow student learns from the teacher."""

from tinyfusion_pl.distill.distillation import Distillation, check_pairs
from tinyfusion_pl.distill.features import HiddenStates, feature_loss, within_sigma

__all__ = ["Distillation", "HiddenStates", "check_pairs", "feature_loss", "within_sigma"]
