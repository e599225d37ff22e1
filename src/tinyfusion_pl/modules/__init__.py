"""LightningModules that train, sample from and extract latents for denoisers."""

from tinyfusion_pl.modules.denoising import Denoising
from tinyfusion_pl.modules.extraction import Extraction
from tinyfusion_pl.modules.generation import Generation
from tinyfusion_pl.modules.lr_schedules import cosine_with_warmup
from tinyfusion_pl.modules.mask_learning import MaskLearning
from tinyfusion_pl.modules.recovery import Recovery
from tinyfusion_pl.modules.strategies import FSDP2Strategy

__all__ = [
    "Denoising",
    "Extraction",
    "FSDP2Strategy",
    "Generation",
    "MaskLearning",
    "Recovery",
    "cosine_with_warmup",
]
