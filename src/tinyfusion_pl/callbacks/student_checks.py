"""Checks that a student in a LightningModule can be distilled."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from tinyfusion_pl.callbacks.student_calls import StudentCalls
from tinyfusion_pl.distill import Distillation
from tinyfusion_pl.pruning import Decision


def check_decision(distillation: Distillation, decision: Decision | None) -> None:
    """Raise `ValueError` if a missing `decision` is needed."""
    if decision is not None:
        return
    if distillation.weight_interval:
        raise ValueError(
            "Interval distillation needs the decision that the student was pruned by. Give "
            "decision=, or set weight_interval=0."
        )
    if distillation.weight_feature and distillation.pairs is None:
        raise ValueError(
            "Representation distillation needs layer pairs. Give decision= or pairs=, or set "
            "weight_feature=0."
        )


def check_unsharded(trainer: Trainer) -> None:
    """Raise `ValueError` for strategies that shard the model."""
    if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
        raise ValueError(
            "DistillationCallback needs full models on every process, but "
            f"{type(trainer.strategy).__name__} shards them. Use strategy='auto' or 'ddp', or "
            "tinyfusion_pl.Recovery, which shards student and teacher."
        )


def find_called(pl_module: LightningModule, module: str) -> nn.Module:
    """The submodule of `pl_module` at path `module`; raise `ValueError` if there is none."""
    try:
        return pl_module.get_submodule(module)
    except AttributeError:
        names = ", ".join(name for name, _ in pl_module.named_children()) or "none"
        raise ValueError(
            f"{type(pl_module).__name__} has no submodule '{module}'. It has: {names}. Give the "
            "path of the student, module=PATH."
        ) from None


def check_called(calls: StudentCalls, *, module: str) -> None:
    """Raise `ValueError` if no call of the student was recorded."""
    if not calls.num_recorded:
        raise ValueError(
            f"training_step did not call '{module}' with gradients in training mode, so there is "
            "nothing to distill. Give the path of the model that it calls, module=PATH, and set "
            "that model to training mode."
        )


def check_student(
    student: nn.Module, teacher: nn.Module, pl_module: LightningModule, *, module: str
) -> None:
    """Check that `student` can be distilled from `teacher`; warn about dropout.

    Args:
        student: The model that trains.
        teacher: The dense model.
        pl_module: The LightningModule that contains `student`.
        module: Path of `student` in `pl_module`.

    Raises:
        ValueError: if the teacher shares parameters with the student or is a submodule of
            `pl_module`, or if the student drops labels inside its forward.
    """
    student_ids = {id(p) for p in student.parameters()}
    if any(id(p) in student_ids for p in teacher.parameters()):
        raise ValueError(
            f"The teacher shares parameters with '{module}', the model that trains. Give the dense "
            "model, or a copy."
        )
    if any(each is teacher for each in pl_module.modules()):
        raise ValueError(
            f"The teacher is a submodule of {type(pl_module).__name__}, so checkpoints would "
            "contain it. Keep it outside the module."
        )
    for name, each in student.named_modules():
        rate = getattr(each, "dropout_prob", 0)
        if "label" in type(each).__name__.lower() and isinstance(rate, (int, float)) and rate > 0:
            raise ValueError(
                f"'{module}.{name}' drops labels at random in its forward (dropout_prob={rate}), "
                "which the teacher cannot repeat. Set its dropout_prob to 0 and drop labels in "
                "training_step."
            )
    if dropping := [name for name, each in student.named_modules() if _drops_at_random(each)]:
        rank_zero_warn(
            f"'{module}' uses dropout ('{dropping[0]}', ...), but the teacher runs without it."
        )


def _drops_at_random(module: nn.Module) -> bool:
    """Whether `module` is a dropout or drop path with a rate above 0."""
    rates = (getattr(module, name, None) for name in ("p", "drop_prob", "dropout"))
    named = "drop" in type(module).__name__.lower() or isinstance(module, nn.MultiheadAttention)
    return named and any(isinstance(rate, (int, float)) and rate > 0 for rate in rates)
