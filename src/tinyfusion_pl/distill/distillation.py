"""Recovery losses.

Fine-tuning, output distillation, representation distillation with or without a mask (TinyFusion,
section 3.4), LIFT, and interval distillation.

loss = weight_kd * kd + weight_data * data + weight_feature(step) * feature, where kd compares the
predictions of student and teacher, data is the objective's own loss, and feature compares the
hidden states of paired layers. Published: 0.9, 0.1, and 1e-2 decaying to 0.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from tinyfusion_pl.distill.collecting import Hidden, Outputs, StudentOutputs, TeacherStates
from tinyfusion_pl.distill.features import check_feature_mask, feature_loss
from tinyfusion_pl.distill.interval_losses import TeacherRuns, interval_loss
from tinyfusion_pl.distill.intervals import Intervals
from tinyfusion_pl.distill.lift import GROUP_SIZE, check_group_size, lift_loss
from tinyfusion_pl.distill.pairs import Pairs
from tinyfusion_pl.protocols import Distance, Draw, Objective
from tinyfusion_pl.pruning import get_stack, linear_anneal

OUTPUT_LOSSES = ("mse", "lift")


class Distillation:
    """The recovery loss of one batch.

    Args:
        weight_kd: Weight of output distillation, >= 0 (published: 0.9).
        weight_data: Weight of the objective's own loss, >= 0 (published: 0.1).
        weight_feature: Weight of representation distillation at the first step, >= 0 (published:
            1e-2); it decays linearly to 0 at the last step.
        feature_mask: See `feature_loss` (published: "reference").
        num_sigma: See `feature_loss` (published: 2).
        pairs: For each stack path, (student block, teacher block) pairs; default: from the
            decision, the last kept block of each group with the last block of that group.
        output_loss: How output distillation compares the predictions: ``"mse"`` (published), or
            ``"lift"``, see `lift_loss`.
        group_size: Elements of a group of ``"lift"``, >= 2 (published: 16).
        weight_interval: Weight of interval distillation (see `tinyfusion_pl.distill.intervals`), >=
            0.
        interval_share: Share of the steps, in (0, 1], that train on intervals only; later steps use
            only the other terms. None: every step uses intervals and the other terms.

    Raises:
        ValueError: For negative weights, all weights zero, an unknown mask or output loss, groups
            that are too small, or a share out of range.
    """

    def __init__(
        self,
        *,
        weight_kd: float = 0.9,
        weight_data: float = 0.1,
        weight_feature: float = 1e-2,
        feature_mask: str = "reference",
        num_sigma: float = 2.0,
        pairs: Pairs | None = None,
        output_loss: str = "mse",
        group_size: int = GROUP_SIZE,
        weight_interval: float = 0.0,
        interval_share: float | None = None,
    ) -> None:
        weights = {
            "weight_kd": weight_kd,
            "weight_data": weight_data,
            "weight_feature": weight_feature,
            "weight_interval": weight_interval,
        }
        if wrong := {name: w for name, w in weights.items() if not w >= 0}:
            raise ValueError(f"Distillation weights must be >= 0, got {wrong}.")
        if not any(weights.values()):
            raise ValueError(
                "All distillation weights are 0: nothing would be learned. Give at least "
                "weight_data > 0."
            )
        check_feature_mask(feature_mask, num_sigma)
        if output_loss not in OUTPUT_LOSSES:
            raise ValueError(
                f"output_loss is {output_loss!r}; give one of "
                f"{', '.join(map(repr, OUTPUT_LOSSES))}."
            )
        if output_loss != "mse" and not weight_kd:
            raise ValueError(
                f"output_loss is {output_loss!r}, but weight_kd is 0: outputs would not be "
                "compared. Give weight_kd > 0."
            )
        check_group_size(group_size)
        if interval_share is not None and (
            isinstance(interval_share, bool) or not 0 < interval_share <= 1
        ):
            raise ValueError(
                f"interval_share is {interval_share!r}; give a share of the steps in (0, 1], or "
                "None for all of them, beside the other terms."
            )
        if interval_share is not None and not weight_interval:
            raise ValueError(
                f"interval_share is {interval_share}, but weight_interval is 0: nothing would be "
                "learned in that share. Give weight_interval > 0, or leave out interval_share."
            )
        if (
            interval_share != 1
            and not (weight_kd or weight_data or weight_feature)
            and interval_share is not None
        ):
            raise ValueError(
                f"interval_share is {interval_share}, and all other weights are 0: the steps "
                "after it would learn nothing. Give interval_share=1, or another weight."
            )
        self.weight_interval, self.interval_share = weight_interval, interval_share
        self.output_loss, self.group_size = output_loss, group_size
        self.weight_kd, self.weight_data, self.weight_feature = (
            weight_kd,
            weight_data,
            weight_feature,
        )
        self.feature_mask, self.num_sigma = feature_mask, num_sigma
        self.pairs = (
            None
            if pairs is None
            else {path: [tuple(pair) for pair in of_path] for path, of_path in pairs.items()}
        )

    @property
    def needs_teacher(self) -> bool:
        """Whether any term compares with the teacher."""
        return bool(self.weight_kd or self.weight_feature or self.weight_interval)

    def feature_weight(self, step: int, num_steps: int) -> float:
        """Weight of the feature loss at `step`: `weight_feature` at the first, 0 at the last."""
        return linear_anneal(step, num_steps, start=self.weight_feature, end=0.0)

    def interval_phase(self, step: int, num_steps: int) -> tuple[bool, bool]:
        """Whether `step` of `num_steps` trains intervals, and whether it trains nothing else."""
        if not self.weight_interval:
            return False, False
        alone = self.interval_share is not None and step < self.interval_share * num_steps
        return alone or self.interval_share is None, alone

    def losses(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        objective: Objective,
        draw: Draw,
        y: Tensor,
        *,
        pairs: Pairs,
        feature_weight: float,
        intervals: Intervals | None = None,
        alone: bool = False,
    ) -> dict[str, Tensor]:
        """Per-sample losses (N,): "loss", the weighted sum, and its terms.

        Terms are "loss_data", "loss_kd", "loss_feature" and "loss_interval"; those with weight 0
        are left out. Teacher and student see the same x_t, t and labels; the teacher runs without a
        graph. A feature weight of 0 collects no hidden states, and no `intervals` trains no
        interval; with `alone`, only the blocks of intervals run and train.
        """
        pairs, intervals = pairs if feature_weight and not alone else {}, intervals or {}
        if alone:
            assert teacher is not None
            with torch.no_grad(), TeacherRuns(teacher, intervals) as runs:
                teacher(draw.x_t, draw.t, y)
            interval = interval_loss(student, runs.take(), intervals) + _nothing(student, intervals)
            return {"loss": self.weight_interval * interval, "loss_interval": interval}
        with StudentOutputs(student, pairs) as outputs:
            output = student(draw.x_t, draw.t, y)
        data = objective.losses(output, draw)["loss"]
        kd: Tensor | None = None
        feature: Tensor | None = None
        interval: Tensor | None = None
        if self.weight_kd or pairs or intervals:
            assert teacher is not None
            with (
                torch.no_grad(),
                TeacherStates(teacher, pairs) as hidden,
                TeacherRuns(teacher, intervals) as runs,
            ):
                teacher_output = teacher(draw.x_t, draw.t, y)
            if self.weight_kd:
                given = {} if (distance := self.distance()) is None else {"distance": distance}
                kd = objective.distillation_losses(output, teacher_output, draw, **given)["loss_kd"]
            if pairs:
                feature = self.feature_losses(outputs.take(), hidden.take(), pairs)
            if intervals:
                interval = interval_loss(student, runs.take(), intervals)
        return self.total(
            data, kd=kd, feature=feature, feature_weight=feature_weight, interval=interval
        )

    def distance(self, *, channel_axis: int = 1) -> Distance | None:
        """Per-sample distance (N,) of two predictions; None for the mean square, the default."""
        return (
            partial(lift_loss, group_size=self.group_size, channel_axis=channel_axis)
            if self.output_loss == "lift"
            else None
        )

    def feature_losses(self, outputs: Outputs, hidden: Hidden, pairs: Pairs) -> Tensor:
        """Representation distillation of one call (N,), averaged over streams and pairs.

        Args:
            outputs: Outputs of the student's blocks.
            hidden: The teacher's hidden states.
            pairs: The layer pairs.

        Raises:
            ValueError: If a pair has no hidden states in common, or of different shapes.
        """
        each = []
        for path, of_path in pairs.items():
            for block, teacher_block in of_path:
                layout, theirs = hidden[path][teacher_block]
                ours = layout.take(outputs[path][block])
                if not (common := [key for key in theirs if key in ours]):
                    raise ValueError(
                        f"Block {block} of the student's '{path}' returns none of the hidden "
                        f"states of the teacher's block {teacher_block}, its pair. Pair blocks of "
                        "the same class."
                    )
                each.append(
                    torch.stack(
                        [self._feature_loss(ours[key], theirs[key]) for key in common]
                    ).mean(0)
                )
        return torch.stack(each).mean(0)

    def _feature_loss(self, ours: Tensor, theirs: Tensor) -> Tensor:
        return feature_loss(
            ours, theirs.to(ours.device), mask=self.feature_mask, num_sigma=self.num_sigma
        )

    def total(
        self,
        data: Tensor,
        *,
        kd: Tensor | None,
        feature: Tensor | None,
        feature_weight: float,
        interval: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The weighted sum "loss" and its terms; omits terms that are None."""
        terms, total = {"loss_data": data}, self.weight_data * data
        if kd is not None:
            terms["loss_kd"], total = kd, total + self.weight_kd * kd
        if feature is not None:
            terms["loss_feature"], total = feature, total + feature_weight * feature
        if interval is not None:
            terms["loss_interval"], total = interval, total + self.weight_interval * interval
        return {"loss": total, **terms}


def _nothing(student: nn.Module, intervals: Intervals) -> Tensor:
    """Zero, with zero gradients for trainable parameters outside the blocks.

    Data-parallel training waits for the gradients of all parameters.
    """
    inside = {
        id(p)
        for path in intervals
        for block in get_stack(student, path)
        for p in block.parameters()
    }
    others = [p for p in student.parameters() if p.requires_grad and id(p) not in inside]
    return sum(
        (0.0 * p.sum() for p in others),
        start=torch.zeros((), device=next(student.parameters()).device),
    )
