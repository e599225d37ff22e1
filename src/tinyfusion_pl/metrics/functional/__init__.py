"""Metrics as functions of features: what the metric classes compute after accumulation."""

from tinyfusion_pl.metrics.functional.frechet import frechet_distance
from tinyfusion_pl.metrics.functional.inception_score import inception_score
from tinyfusion_pl.metrics.functional.kernel import gaussian_mmd, kernel_inception_distance
from tinyfusion_pl.metrics.functional.precision_recall import precision_recall

__all__ = [
    "frechet_distance",
    "gaussian_mmd",
    "inception_score",
    "kernel_inception_distance",
    "precision_recall",
]
