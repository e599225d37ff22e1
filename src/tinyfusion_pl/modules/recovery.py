"""Recovery (TinyFusion, section 3.4): trains a shallow student on the data and its teacher."""

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
from tinyfusion_pl.distill.intervals import Intervals
from tinyfusion_pl.distill.pairs import Pairs
from tinyfusion_pl.distill.teacher import lowered
from tinyfusion_pl.modules.denoising import Denoising, get_blocks
from tinyfusion_pl.pruning import Decision, find_stacks
from tinyfusion_pl.pruning.sharding import is_sharded, shard

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""Precision of a Trainer -> dtype that it casts to."""

UNEQUAL_WIDTHS = (
    "Representation distillation, interval distillation and linear maps in place of blocks need "
    "hidden states of equal width, but the student has fewer channels than the teacher. Give "
    "distill=output, and remove recover.replace."
)


class Recovery(Denoising):
    """Trains a shallow student with the recovery losses.

    Args:
        student: The shallow denoiser.
        teacher: The dense denoiser. It is frozen, set to evaluation mode and kept out of
            checkpoints. In mixed precision a copy in that precision runs. None for plain
            fine-tuning.
        decision: The decision that the student was pruned by. Layer pairs and intervals come from
            it; not needed without interval weight if `distillation` has pairs or no feature weight.
            An empty decision checks everything else before the real one is known.
        distillation: Loss weights and feature mask. Default: the published ones.
        kwargs: ``objective``, ``optimizer``, ``scheduler`` and ``label_dropout`` of `Denoising`
            (published: AdamW 2e-4, cosine to 1e-4).

    Raises:
        ValueError: if a required teacher, pairs or decision are missing, pairs do not fit the
            stacks, intervals cannot be trained, or hidden states of unequal width are compared.
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
                "Distillation needs a teacher. Give one, or set weight_kd and weight_feature to 0 "
                "for plain fine-tuning."
            )
        self._teacher = None if teacher is None else Teacher(teacher)
        self.pairs: Pairs | None = self.distillation.pairs
        if self.pairs is None and decision is not None:
            self.pairs = {path: stack.layer_pairs() for path, stack in decision.stacks.items()}
        if self.pairs is None and self.distillation.weight_feature:
            raise ValueError(
                "Representation distillation needs layer pairs. Give the decision, or pairs in the "
                "distillation config."
            )
        if self.pairs and teacher is not None:
            check_pairs(self.pairs, student, teacher)
        compares = self.distillation.weight_feature or self.distillation.weight_interval
        if compares and getattr(student, "width", None) != getattr(teacher, "width", None):
            raise ValueError(UNEQUAL_WIDTHS)
        self.intervals = self._intervals(decision) if self.distillation.weight_interval else None

    def _intervals(self, decision: Decision | None) -> Intervals:
        if decision is None:
            raise ValueError(
                "Interval distillation needs the decision that the student was pruned by. Give it, "
                "or set weight_interval=0."
            )
        assert self.teacher is not None  # needs_teacher was checked
        for path in decision.stacks or find_stacks(self.teacher):
            check_single_blocks(self.teacher, path)
        return resolve_intervals(decision, self.denoiser, self.teacher)

    @property
    def teacher(self) -> nn.Module | None:
        """The dense denoiser; None without distillation."""
        return None if self._teacher is None else self._teacher.model

    def configure_model(self) -> None:
        """Shard the student and a copy of the teacher; the given teacher stays as it is."""
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
        """Raise `ValueError` for interval distillation, which runs single blocks."""
        if self.distillation.weight_interval:
            raise ValueError(
                "Interval distillation runs single blocks of the student, but FSDP2 gathers their "
                "weights only in a call of the whole student. Give another distill, such as "
                "distill=output, or trainer=ddp."
            )

    def blocks(self) -> Iterator[nn.Module]:
        """The blocks of the student and, if distillation needs it, of the teacher."""
        yield from super().blocks()
        if self.teacher is not None and self.distillation.needs_teacher:
            yield from get_blocks(self.teacher)

    def get_ready(self) -> None:
        """Lower the teacher to the autocast dtype, and move it to the device."""
        if self._teacher is None:
            return
        dtype = AUTOCAST.get(self.trainer.precision)
        if dtype is not None and not is_sharded(self._teacher.model):
            self._teacher = Teacher(lowered(self._teacher.model, dtype))
        self._teacher.wake(self.device)

    def losses(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Per-sample recovery losses (N,) and their terms, see `Distillation.losses`."""
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
