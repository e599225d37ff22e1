"""Recovery losses: fine-tuning, output distillation, representation distillation, masked or not (TinyFusion, section 3.4).

loss = weight_kd * kd + weight_data * data + weight_feature(step) * feature, where kd compares the student's prediction with the teacher's,
data with the data itself, and feature the hidden states of paired layers. Published: 0.9, 0.1, and 1e-2 falling to 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion_pl.distill.features import HiddenStates, check_feature_mask, feature_loss
from tinyfusion_pl.pruning import get_stack, linear_anneal

Pairs = Mapping[str, Sequence[tuple[int, int]]]


def check_pairs(pairs: Pairs, student: nn.Module, teacher: nn.Module) -> None:
    """`ValueError` unless each (student block, teacher block) of `pairs` is in the stacks of its path."""
    for path, of_path in pairs.items():
        sizes = len(get_stack(student, path)), len(get_stack(teacher, path))
        for pair in of_path:
            if len(pair) != 2 or not all(0 <= index < size for index, size in zip(pair, sizes)):
                raise ValueError(f"Layer pair {list(pair)} of '{path}' does not fit: a pair is (student block 0..{sizes[0] - 1}, "
                                 f"teacher block 0..{sizes[1] - 1}).")


class Distillation:
    """The recovery loss of one batch.

    Args:
        weight_kd: Weight of output distillation, >= 0 (published: 0.9).
        weight_data: Weight of the objective's own loss, >= 0 (published: 0.1).
        weight_feature: Weight of representation distillation at the first step, >= 0 (published: 1e-2); it falls linearly to 0 at the
            last step.
        feature_mask, num_sigma: See `feature_loss` (published: "reference", 2).
        pairs: For each stack path, (student block, teacher block) pairs; default: from the decision, the last kept block of each group
            with the last block of that group.

    Raises:
        ValueError: for negative weights, all weights zero, or an unknown mask.
    """

    def __init__(self, *, weight_kd: float = 0.9, weight_data: float = 0.1, weight_feature: float = 1e-2, feature_mask: str = "reference",
                 num_sigma: float = 2.0, pairs: Pairs | None = None) -> None:
        weights = {"weight_kd": weight_kd, "weight_data": weight_data, "weight_feature": weight_feature}
        if wrong := {name: w for name, w in weights.items() if not w >= 0}:
            raise ValueError(f"Distillation weights must be >= 0, got {wrong}.")
        if not any(weights.values()):
            raise ValueError("All distillation weights are 0: nothing would be learned. Give at least weight_data > 0.")
        check_feature_mask(feature_mask, num_sigma)
        self.weight_kd, self.weight_data, self.weight_feature = weight_kd, weight_data, weight_feature
        self.feature_mask, self.num_sigma = feature_mask, num_sigma
        self.pairs = None if pairs is None else {path: [tuple(pair) for pair in of_path] for path, of_path in pairs.items()}

    @property
    def needs_teacher(self) -> bool:
        return bool(self.weight_kd or self.weight_feature)

    def feature_weight(self, step: int, num_steps: int) -> float:
        """Weight of the feature loss at `step` of `num_steps`, `weight_feature` at the first and 0 at the last."""
        return linear_anneal(step, num_steps, start=self.weight_feature, end=0.0)

    def losses(self, student: nn.Module, teacher: nn.Module | None, objective: Any, draw: Any, y: Tensor, *, pairs: Pairs,
               feature_weight: float) -> dict[str, Tensor]:
        """Per-sample losses (N,): "loss" (the weighted sum), "loss_data", and where weighted "loss_kd" and "loss_feature".

        Teacher and student see the same x_t, t and labels; the teacher runs without a graph. With a feature weight of 0 no hidden
        states are collected.
        """
        pairs = pairs if feature_weight else {}
        taps = [HiddenStates(student, path, [s for s, _ in of_path]) for path, of_path in pairs.items()]
        with ExitStack() as stack:
            hidden = [stack.enter_context(tap) for tap in taps]
            output = student(draw.x_t, draw.t, y)
        terms = {"loss_data": objective.losses(output, draw)["loss"]}
        total = self.weight_data * terms["loss_data"]
        if self.weight_kd or pairs:
            teacher_taps = [HiddenStates(teacher, path, [t for _, t in of_path]) for path, of_path in pairs.items()]
            with torch.no_grad(), ExitStack() as stack:
                teacher_hidden = [stack.enter_context(tap) for tap in teacher_taps]
                teacher_output = teacher(draw.x_t, draw.t, y)
            if self.weight_kd:
                terms["loss_kd"] = objective.distillation_losses(output, teacher_output, draw)["loss_kd"]
                total = total + self.weight_kd * terms["loss_kd"]
            if pairs:
                each = [feature_loss(of_student[s], of_teacher[t], mask=self.feature_mask, num_sigma=self.num_sigma)
                        for of_student, of_teacher, of_path in zip(hidden, teacher_hidden, pairs.values()) for s, t in of_path]
                terms["loss_feature"] = torch.stack(each).mean(0)
                total = total + feature_weight * terms["loss_feature"]
        return {"loss": total, **terms}

