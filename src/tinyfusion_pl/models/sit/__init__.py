"""SiT (Ma et al., arXiv 2401.08740)."""

from tinyfusion_pl.models.sit.family import FAMILY
from tinyfusion_pl.models.sit.model import SiT

__all__ = ["FAMILY", "SiT"]
