"""What masks are learned by: the module's own loss, or the output of the model's original weights."""

from __future__ import annotations

from lightning.pytorch import LightningModule

from tinyfusion_pl.pruning import DepthPruner

SEARCH_LOSSES = ("data", "teacher")


def check_name(search_loss: str) -> str:
    """`ValueError` for another word."""
    if search_loss not in SEARCH_LOSSES:
        raise ValueError(
            f"search_loss is {search_loss!r}; give 'data' (the module's own loss, published) or 'teacher' (the distance to the "
            "output of the original weights)."
        )
    return search_loss


def check(pl_module: LightningModule, search_loss: str) -> None:
    """`ValueError` for a module whose loss cannot be replaced."""
    if search_loss == "teacher" and not _learns_from(pl_module):
        raise ValueError(
            f"search_loss is 'teacher', but the loss of {type(pl_module).__name__} is its own. Use "
            "tinyfusion_pl.MaskLearning, or search_loss='data' and a training_step that computes the "
            "distance to a frozen copy itself."
        )


def start(pl_module: LightningModule, search_loss: str, pruner: DepthPruner) -> None:
    """Give a module that can learn from a teacher the one of this fit, or none."""
    if _learns_from(pl_module):
        pl_module.learn_from(pruner.dense(pl_module) if search_loss == "teacher" else None)


def _learns_from(pl_module: LightningModule) -> bool:
    return callable(getattr(pl_module, "learn_from", None))
