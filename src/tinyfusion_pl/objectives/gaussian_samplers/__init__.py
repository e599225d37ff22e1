"""Samplers of Gaussian diffusion, one file each, by name.

A file here registers its sampler (`register_sampler`); all files of the folder are imported.
"""

from importlib import import_module
from pkgutil import iter_modules

from tinyfusion_pl.objectives.gaussian_samplers.base import (
    SAMPLERS,
    GaussianSampling,
    Sampler,
    register_sampler,
)

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["SAMPLERS", "GaussianSampling", "Sampler", "register_sampler"]
