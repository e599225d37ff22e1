"""The loss that masks are learned by: the module's own, or the distance to the original model."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from lightning.pytorch import LightningModule
from torch import nn

from tinyfusion_pl.pruning import DepthPruner

SEARCH_LOSSES = ("data", "teacher")


@runtime_checkable
class LearnsFromTeacher(Protocol):
    """A module whose loss can be the distance to a teacher, such as `MaskLearning`."""

    def learn_from(self, teacher: nn.Module | None) -> None:
        """Use the output of `teacher` as the target; None uses the data."""


def check_name(search_loss: str) -> str:
    """Return `search_loss`; raise `ValueError` if it is unknown."""
    if search_loss not in SEARCH_LOSSES:
        raise ValueError(
            f"search_loss is {search_loss!r}; give 'data' (the module's own loss, published) or "
            "'teacher' (the distance to the output of the original weights)."
        )
    return search_loss


def check(pl_module: LightningModule, search_loss: str) -> None:
    """Raise `ValueError` if the loss of `pl_module` cannot be replaced by the teacher's."""
    if search_loss == "teacher" and not isinstance(pl_module, LearnsFromTeacher):
        raise ValueError(
            f"search_loss is 'teacher', but {type(pl_module).__name__} computes its own loss. Use "
            "tinyfusion_pl.MaskLearning, or search_loss='data' with a training_step that computes "
            "the distance to a frozen copy."
        )


def start(pl_module: LightningModule, search_loss: str, pruner: DepthPruner) -> None:
    """Set the teacher of this fit, or none, if `pl_module` can learn from one."""
    if isinstance(pl_module, LearnsFromTeacher):
        pl_module.learn_from(pruner.dense(pl_module) if search_loss == "teacher" else None)
