"""DiT (Peebles & Xie, arXiv 2212.09748)."""

from tinyfusion_pl.models.dit.family import FAMILY
from tinyfusion_pl.models.dit.model import DiT, DiTBlock, FinalLayer, sincos_position_embedding

__all__ = ["FAMILY", "DiT", "DiTBlock", "FinalLayer", "sincos_position_embedding"]
