"""Objectives: noising process, losses, distillation losses, samplers."""

from tinyfusion_pl.objectives.base import Draw, Objective
from tinyfusion_pl.objectives.gaussian_diffusion import GaussianDiffusion
from tinyfusion_pl.objectives.interpolants import Interpolants
from tinyfusion_pl.objectives.masked_autoregression import MaskedAutoregression
from tinyfusion_pl.objectives.pictures import (
    PictureSampler,
    balanced_labels,
    labels_of,
    noise_of,
    random_labels,
)

__all__ = [
    "Draw",
    "GaussianDiffusion",
    "Interpolants",
    "MaskedAutoregression",
    "Objective",
    "PictureSampler",
    "balanced_labels",
    "labels_of",
    "noise_of",
    "random_labels",
]
