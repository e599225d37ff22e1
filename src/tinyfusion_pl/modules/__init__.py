"""LightningModules: thin shells around a denoiser and an objective."""

from tinyfusion_pl.modules.denoising import Denoising
from tinyfusion_pl.modules.extraction import Extraction
from tinyfusion_pl.modules.generation import Generation
from tinyfusion_pl.modules.mask_learning import MaskLearning
from tinyfusion_pl.modules.recovery import Recovery
from tinyfusion_pl.modules.schedules import cosine_with_warmup

__all__ = ["Denoising", "Extraction", "Generation", "MaskLearning", "Recovery", "cosine_with_warmup"]
