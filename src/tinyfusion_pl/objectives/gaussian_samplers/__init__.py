"""Samplers of Gaussian diffusion by name, one file each.

Each file registers its sampler with `register_sampler`; all files of this folder are imported.
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
