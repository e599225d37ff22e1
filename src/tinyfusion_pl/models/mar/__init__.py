"""MAR (Li et al., arXiv 2406.11838)."""

from tinyfusion_pl.models.mar.family import FAMILY
from tinyfusion_pl.models.mar.head import DiffusionHead
from tinyfusion_pl.models.mar.model import MAR, MaskedTokens, put, take

__all__ = ["FAMILY", "MAR", "DiffusionHead", "MaskedTokens", "put", "take"]
