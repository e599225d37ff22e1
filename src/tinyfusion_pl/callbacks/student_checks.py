"""What is refused of a student before it is distilled in a LightningModule."""

from __future__ import annotations

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn


def check_student(
    student: nn.Module, teacher: nn.Module, pl_module: LightningModule, *, module: str
) -> None:
    """Find out whether `student`, at `module` of `pl_module`, can be distilled from `teacher`; warns of dropout.

    Raises:
        ValueError: for a teacher that shares parameters or is part of `pl_module`, or labels that are dropped inside the student.
    """
    mine = {id(p) for p in student.parameters()}
    if any(id(p) in mine for p in teacher.parameters()):
        raise ValueError(
            f"The teacher shares parameters with '{module}', the model that trains. Give the dense model, or a copy."
        )
    if any(each is teacher for each in pl_module.modules()):
        raise ValueError(
            f"The teacher is a submodule of {type(pl_module).__name__}, so it would go into checkpoints. Keep it outside."
        )
    for name, each in student.named_modules():
        rate = getattr(each, "dropout_prob", 0)
        if "label" in type(each).__name__.lower() and isinstance(rate, (int, float)) and rate > 0:
            raise ValueError(f"'{module}.{name}' drops labels at random inside forward (dropout_prob={rate}), which the teacher "
                             "cannot repeat. Set its dropout_prob to 0 and drop labels in training_step.")  # fmt: skip
    if dropping := [name for name, each in student.named_modules() if _drops_at_random(each)]:
        rank_zero_warn(
            f"'{module}' has dropout ('{dropping[0]}', ...); the teacher runs without it."
        )


def _drops_at_random(module: nn.Module) -> bool:
    """Whether it is a dropout or drop path with a rate above 0."""
    rates = (getattr(module, name, None) for name in ("p", "drop_prob", "dropout"))
    named = "drop" in type(module).__name__.lower() or isinstance(module, nn.MultiheadAttention)
    return named and any(isinstance(rate, (int, float)) and rate > 0 for rate in rates)
