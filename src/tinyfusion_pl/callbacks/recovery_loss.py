"""Computes the recovery loss of a training step from the calls that it made to the student."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tinyfusion_pl.callbacks.student_calls import StudentCall, StudentCalls
from tinyfusion_pl.distill import Distillation, interval_loss, needs_grad, output_loss


class RecoveryLoss:
    """The recovery loss, with the terms of several calls averaged.

    Args:
        distillation: The loss weights.
        module: Path of the student in the LightningModule, for messages.
        channel_axis: Axis of the channels in the outputs, see `DistillationCallback`.
    """

    def __init__(self, distillation: Distillation, *, module: str, channel_axis: int) -> None:
        if isinstance(channel_axis, bool) or not isinstance(channel_axis, int) or channel_axis == 0:
            raise ValueError(
                f"channel_axis is {channel_axis!r}; give 1 for outputs (N, C, ...) or -1 for "
                "(N, T, C). Axis 0 is the batch."
            )
        self.distillation, self.module = distillation, module
        self.distance = distillation.distance(channel_axis=channel_axis)

    def __call__(
        self,
        user_loss: Tensor,
        calls: Sequence[StudentCall],
        student: StudentCalls,
        *,
        step: int,
        num_steps: int,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The recovery loss and its terms for the log.

        Args:
            user_loss: The loss of the training step.
            calls: The calls that it depends on, at least one.
            student: The student that they called.
            step: The current step.
            num_steps: Number of steps of the fit.
        """
        distillation = self.distillation
        interval = self._interval_loss(calls, student)
        if distillation.interval_phase(step, num_steps)[1]:
            assert interval is not None  # every call has runs in this phase
            terms = {"loss_interval": interval}
            # With the user's loss in the graph all parameters get a (zero) gradient, as DDP needs.
            return 0.0 * user_loss + distillation.weight_interval * interval, terms
        kd = None
        if distillation.weight_kd:
            distances = [
                output_loss(call.output, call.teacher_output, distance=self.distance)
                for call in calls
            ]
            kd = torch.stack(distances).mean()
        feature = None
        if with_states := [call for call in calls if call.hidden]:
            feature = torch.stack([self._feature_loss(call, student) for call in with_states])
            feature = feature.mean()
        terms = distillation.total(
            user_loss,
            kd=kd,
            feature=feature,
            feature_weight=self.feature_weight(step, num_steps),
            interval=interval,
        )
        return terms.pop("loss"), terms

    def feature_weight(self, step: int, num_steps: int) -> float:
        """The weight of the feature loss at `step`; 0 from the last step on."""
        if not self.distillation.weight_feature:
            return 0.0
        return self.distillation.feature_weight(min(step, num_steps - 1), num_steps)

    def _interval_loss(self, calls: Sequence[StudentCall], student: StudentCalls) -> Tensor | None:
        found = [
            interval_loss(student.student, call.runs, student.intervals).mean()
            for call in calls
            if call.runs is not None
        ]
        return torch.stack(found).mean() if found else None

    def _feature_loss(self, call: StudentCall, student: StudentCalls) -> Tensor:
        for path, pairs in student.pairs.items():
            for block, _ in pairs:
                self._check_block(call, student, path, block)
        return self.distillation.feature_losses(call.outputs, call.hidden, student.pairs).mean()

    def _check_block(self, call: StudentCall, student: StudentCalls, path: str, block: int) -> None:
        """Raise `ValueError` if a paired block has no hidden states, or none with a gradient."""
        name = f"Block {block} of '{self.module}.{path}'"
        if block not in call.outputs[path]:
            raise ValueError(
                f"{name} did not run in a call of '{self.module}', so its pair has no hidden "
                "states. Give pairs= of blocks that always run, or set weight_feature=0."
            )
        parameters = student.outputs.collectors[path].blocks[block].parameters()
        if any(p.requires_grad for p in parameters) and not needs_grad(call.outputs[path][block]):
            raise ValueError(
                f"{name} has trainable weights, but its hidden states have no gradient: it ran "
                "under torch.no_grad, or reentrant activation checkpointing had no input that "
                "requires a gradient (use use_reentrant=False)."
            )
