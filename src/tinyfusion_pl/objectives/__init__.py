"""Objectives: noising process, losses, distillation losses, samplers."""

import warnings
from typing import Any

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

_RENAMED = {
    "PictureSampler": "ImageSampler",
    "labels_of": "get_labels",
    "noise_of": "sample_noise",
}


def __getattr__(name: str) -> Any:
    """Names of the previous release."""
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    new = _RENAMED[name]
    warnings.warn(
        f"{__name__}.{name} is deprecated; use {__name__}.{new}.",
        DeprecationWarning,
        stacklevel=2,
    )
    return globals()[new]
