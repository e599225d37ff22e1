"""Recovery: the shallow student learns from data and from the teacher (TinyFusion, section 3.4)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion_pl.distill import (
    Distillation,
    Teacher,
    check_pairs,
    check_single_blocks,
    resolve_intervals,
)
from tinyfusion_pl.distill.teacher import lowered
from tinyfusion_pl.modules.denoising import Denoising, get_blocks
from tinyfusion_pl.pruning import Decision, find_stacks
from tinyfusion_pl.pruning.sharding import is_sharded, shard

AUTOCAST = {
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
}  # precision of a Trainer -> what it casts to
UNEQUAL_WIDTHS = (
    "Representation and interval distillation, and linear maps in place of blocks, go from hidden states to others of equal width, and the "
    "student's have fewer channels than the teacher's. Give distill=output, and leave out recover.replace."
)


class Recovery(Denoising):
    """Trains a shallow student with the recovery losses.

    Args:
        student: The shallow denoiser.
        teacher: The dense denoiser, frozen, in evaluation mode, not in checkpoints; in mixed precision a copy of it in that precision runs.
            May be None for fine-tuning alone.
        decision: The decision the student came from, for the layer pairs and intervals; not needed where `distillation` gives pairs or no
            feature weight, and no interval weight. An empty one, where it is not there yet, only has the rest checked.
        distillation: Weights and mask; default: the published ones.
        objective, optimizer, scheduler, label_dropout: See `Denoising` (published: AdamW 2e-4, cosine to 1e-4).

    Raises:
        ValueError: when a teacher, the pairs or the decision are needed and missing, pairs do not fit the stacks, intervals cannot be
            trained, or the student is narrower than a teacher whose hidden states it is to learn from.
    """

    default_lr = 2e-4

    def __init__(
        self,
        student: nn.Module,
        *,
        teacher: nn.Module | None,
        decision: Decision | None = None,
        distillation: Distillation | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, **kwargs)
        self.distillation = distillation or Distillation()
        if self.distillation.needs_teacher and teacher is None:
            raise ValueError(
                "Distillation needs a teacher. Give one, or set weight_kd and weight_feature to 0 for plain fine-tuning."
            )
        self._teacher = None if teacher is None else Teacher(teacher)
        self.pairs = self.distillation.pairs
        if self.pairs is None and decision is not None:
            self.pairs = {path: stack.layer_pairs() for path, stack in decision.stacks.items()}
        if self.pairs is None and self.distillation.weight_feature:
            raise ValueError(
                "Representation distillation needs layer pairs: give the decision, or pairs in the distillation config."
            )
        if self.pairs and teacher is not None:
            check_pairs(self.pairs, student, teacher)
        compares = self.distillation.weight_feature or self.distillation.weight_interval
        if compares and getattr(student, "width", None) != getattr(teacher, "width", None):
            raise ValueError(UNEQUAL_WIDTHS)
        self.intervals = self._intervals(decision) if self.distillation.weight_interval else None

    def _intervals(self, decision: Decision | None) -> Any:
        if decision is None:
            raise ValueError(
                "Interval distillation needs the decision that the student came from: give it, or set weight_interval=0."
            )
        for path in decision.stacks or find_stacks(self.teacher):
            check_single_blocks(self.teacher, path)
        return resolve_intervals(decision, self.denoiser, self.teacher)

    @property
    def teacher(self) -> nn.Module | None:
        return None if self._teacher is None else self._teacher.model

    def configure_model(self) -> None:
        """Share out student and teacher; of the teacher a copy, for it belongs to whoever gave it."""
        super().configure_model()
        if (
            self._device_mesh is not None
            and self.teacher is not None
            and not is_sharded(self.teacher)
        ):
            self._teacher = Teacher(
                shard(copy.deepcopy(self.teacher), self._device_mesh["data_parallel"])
            )

    def check_sharded(self) -> None:
        if self.distillation.weight_interval:
            raise ValueError(
                "Interval distillation runs the student's blocks by themselves, outside a call of the whole student, in which "
                "FSDP2 gathers their weights. Give distill=output or another one, or trainer=ddp."
            )

    def blocks(self) -> Iterator[nn.Module]:
        yield from super().blocks()
        if self.teacher is not None and self.distillation.needs_teacher:
            yield from get_blocks(self.teacher)

    def get_ready(self) -> None:
        if (
            self._teacher is not None
            and (dtype := AUTOCAST.get(self.trainer.precision)) is not None
            and not is_sharded(self.teacher)
        ):
            self._teacher = Teacher(lowered(self._teacher.model, dtype))
        if self._teacher is not None:
            self._teacher.wake(self.device)

    def losses(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        step, num_steps = self.global_step, int(self.trainer.estimated_stepping_batches)
        with_intervals, alone = self.distillation.interval_phase(step, num_steps)
        return self.distillation.losses(
            self.denoiser,
            self.teacher,
            self.objective,
            self.objective.draw(x),
            y,
            pairs=self.pairs or {},
            feature_weight=self.distillation.feature_weight(step, num_steps),
            intervals=self.intervals if with_intervals else None,
            alone=alone,
        )
