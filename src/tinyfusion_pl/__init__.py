"""Making trained diffusion transformers shallow (TinyFusion, arXiv 2412.01199) as a PyTorch Lightning plugin."""

from tinyfusion_pl.callbacks import DepthPruningCallback
from tinyfusion_pl.models import create_model, load_shallow
from tinyfusion_pl.modules import MaskLearning, Recovery

__all__ = ["DepthPruningCallback", "MaskLearning", "Recovery", "create_model", "load_shallow"]
