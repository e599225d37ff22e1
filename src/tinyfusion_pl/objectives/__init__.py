"""Objectives: noising process, losses, distillation losses, samplers."""

from tinyfusion_pl.objectives.base import Draw, Objective
from tinyfusion_pl.objectives.gaussian_diffusion import GaussianDiffusion
from tinyfusion_pl.objectives.image_sampler import (
    ImageSampler,
    balanced_labels,
    get_labels,
    random_labels,
    sample_noise,
)
from tinyfusion_pl.objectives.interpolants import Interpolants
from tinyfusion_pl.objectives.masked_autoregression import MaskedAutoregression

__all__ = [
    "Draw",
    "GaussianDiffusion",
    "Interpolants",
    "MaskedAutoregression",
    "Objective",
    "ImageSampler",
    "balanced_labels",
    "get_labels",
    "sample_noise",
    "random_labels",
]
