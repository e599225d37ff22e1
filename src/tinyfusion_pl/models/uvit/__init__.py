"""U-ViT (Bao et al., arXiv 2209.12152)."""

from tinyfusion_pl.models.uvit.family import FAMILY
from tinyfusion_pl.models.uvit.model import UViT

__all__ = ["FAMILY", "UViT"]
