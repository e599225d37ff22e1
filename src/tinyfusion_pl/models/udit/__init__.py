"""U-DiT (Tian et al., arXiv 2405.02730)."""

from tinyfusion_pl.models.udit.family import FAMILY
from tinyfusion_pl.models.udit.merging import merged
from tinyfusion_pl.models.udit.model import UDiT
from tinyfusion_pl.models.udit.positions import rotate, rotation

__all__ = ["FAMILY", "UDiT", "merged", "rotate", "rotation"]
