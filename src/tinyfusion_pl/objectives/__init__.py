"""Objectives: noising process, losses, distillation losses, samplers."""

from tinyfusion_pl.objectives.base import Draw, Objective
from tinyfusion_pl.objectives.gaussian_diffusion import GaussianDiffusion

__all__ = ["Draw", "GaussianDiffusion", "Objective"]
