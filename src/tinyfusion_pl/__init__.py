"""Depth pruning of trained diffusion transformers as a PyTorch Lightning plugin.

TinyFusion, arXiv 2412.01199.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinyfusion_pl.callbacks import DepthPruningCallback, DistillationCallback
    from tinyfusion_pl.models import create_model, load_shallow
    from tinyfusion_pl.modules import MaskLearning, Recovery

__all__ = [
    "DepthPruningCallback",
    "DistillationCallback",
    "MaskLearning",
    "Recovery",
    "create_model",
    "load_shallow",
]

# Imported on first use: torch and Lightning take seconds, which `tinyfusion --help` does not need.
_HOMES = {
    "DepthPruningCallback": "callbacks",
    "DistillationCallback": "callbacks",
    "MaskLearning": "modules",
    "Recovery": "modules",
    "create_model": "models",
    "load_shallow": "models",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"tinyfusion_pl.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'tinyfusion_pl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
