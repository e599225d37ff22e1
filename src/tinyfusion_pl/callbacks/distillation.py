"""Recovery of a pruned model by distillation, for any LightningModule (TinyFusion, section 3.4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from tinyfusion_pl.callbacks.recovery_loss import RecoveryLoss
from tinyfusion_pl.callbacks.replaced_method import (
    replace_method,
    wrap_manual_backward,
    wrap_training_step,
)
from tinyfusion_pl.callbacks.step_count import StepCount, check_anneal_steps
from tinyfusion_pl.callbacks.student_calls import StudentCall, StudentCalls, TeacherRequest
from tinyfusion_pl.callbacks.student_checks import (
    check_called,
    check_decision,
    check_student,
    check_unsharded,
    find_called,
)
from tinyfusion_pl.distill import Distillation, Teacher, resolve_intervals, resolve_pairs
from tinyfusion_pl.distill.intervals import Intervals
from tinyfusion_pl.distill.lift import GROUP_SIZE
from tinyfusion_pl.distill.pairs import Pairs
from tinyfusion_pl.pruning import Decision


class DistillationCallback(Callback):
    """Adds output, masked representation and interval distillation to a LightningModule's loss.

    Each call that `training_step` makes to `module` is repeated on the teacher with the same inputs
    and no graph. The loss is
    ``weight_data * user_loss + weight_kd * kd + weight_feature(step) * feature``, with the terms of
    several calls averaged. It replaces the loss that `training_step` returns (a tensor, or a dict
    with "loss"). With manual optimization it replaces the first loss passed to `manual_backward`
    that depends on the call. Calls without gradients or in evaluation mode are ignored. See
    docs/recovery.md.

    Args:
        teacher: The dense model, of the student's class. It is frozen, set to evaluation mode, and
            must not be part of the LightningModule.
        module: Path of the student in the LightningModule.
        weight_kd, weight_data, weight_feature, num_sigma, feature_mask: See `Distillation`.
        pairs: For each stack path, (student block, teacher block) pairs. Default: from `decision`.
        output_loss, group_size, weight_interval: See `Distillation`. Intervals need `decision`.
        interval_share: See `Distillation`; a fraction of the fit or of `anneal_steps`. The model
            runs in these steps too, but its loss has weight 0.
        channel_axis: For ``output_loss="lift"``, the axis of the channels in the model's outputs,
            batch first: 1 for (N, C, ...), -1 for (N, T, C).
        decision: The decision that the student was pruned by (`DepthPruningCallback.decision`).
        anneal_steps: Number of optimizer steps in which the feature weight falls to 0. Default: the
            whole fit.
        streams: For a stack path, the names of the block arguments that are hidden states. Default:
            discovered.
        device: Device of the teacher. Default: the device of the LightningModule.
        offload: Move the teacher to the CPU after each batch.

    Example::

        recovery = DistillationCallback(teacher, module="transformer", decision=pruning.decision)
        Trainer(max_steps=10_000, callbacks=[recovery]).fit(module)
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        module: str = "transformer",
        weight_kd: float = 0.9,
        weight_data: float = 0.1,
        weight_feature: float = 1e-2,
        num_sigma: float = 2.0,
        feature_mask: str = "reference",
        pairs: Pairs | None = None,
        decision: Decision | None = None,
        anneal_steps: int | None = None,
        streams: Mapping[str, Sequence[str]] | None = None,
        device: torch.device | str | None = None,
        offload: bool = False,
        output_loss: str = "mse",
        group_size: int = GROUP_SIZE,
        channel_axis: int = 1,
        weight_interval: float = 0.0,
        interval_share: float | None = None,
    ) -> None:
        self.distillation = Distillation(
            weight_kd=weight_kd,
            weight_data=weight_data,
            weight_feature=weight_feature,
            num_sigma=num_sigma,
            feature_mask=feature_mask,
            pairs=pairs,
            output_loss=output_loss,
            group_size=group_size,
            weight_interval=weight_interval,
            interval_share=interval_share,
        )
        self._loss = RecoveryLoss(self.distillation, module=module, channel_axis=channel_axis)
        check_anneal_steps(anneal_steps)
        check_decision(self.distillation, decision)
        self.pairs: Pairs | None = self.distillation.pairs
        self.decision, self.streams = decision, streams
        self._teacher = Teacher(teacher, device=device, offload=offload)
        self.module, self.anneal_steps = module, anneal_steps
        self._calls: StudentCalls | None = None
        self._undo: list[Callable[[], Any]] = []
        self._steps = StepCount()

    @property
    def teacher(self) -> nn.Module:
        """The frozen dense model."""
        return self._teacher.model

    @property
    def _student(self) -> StudentCalls:
        assert self._calls is not None, "on_fit_start finds the student"
        return self._calls

    # -- attaching ------------------------------------------------------------------------------
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find and check the student, and replace the loss of the module."""
        check_unsharded(trainer)
        called = find_called(pl_module, self.module)
        student = getattr(called, "_orig_mod", called)
        check_student(student, self.teacher, pl_module, module=self.module)
        self._steps.start()
        total = trainer.estimated_stepping_batches
        needs_end = self.distillation.weight_feature or self.distillation.interval_share is not None
        if self.anneal_steps is None and needs_end and total == float("inf"):
            raise ValueError(
                "The fit has no end, so weight_feature cannot fall to 0 and interval_share has no "
                "steps to be a share of. Give anneal_steps, or max_steps to the Trainer."
            )
        # max_steps counts the steps of all optimizers, the length of an epoch counts batches.
        self._steps.follows_trainer = self.anneal_steps is None and total == trainer.max_steps
        pairs, intervals = self._resolve(student, pl_module)
        self._calls = StudentCalls(
            called,
            student,
            self._teacher,
            pairs,
            streams=self.streams,
            is_training=lambda: trainer.training,
            request=lambda: self._request(trainer),
            device=lambda: pl_module.device,
            intervals=intervals,
        )
        self._install(pl_module)

    def _resolve(
        self, student: nn.Module, pl_module: LightningModule
    ) -> tuple[Pairs, Intervals | None]:
        bare = getattr(self.teacher, "_orig_mod", self.teacher)
        pairs: Pairs = {}
        intervals: Intervals | None = None
        if self.distillation.weight_interval:
            assert self.decision is not None
            intervals = resolve_intervals(
                self.decision, student, bare, module=self.module, owner=pl_module
            )
        if self.distillation.weight_feature:
            source = self.pairs or self.decision
            assert source is not None
            pairs = resolve_pairs(source, student, bare, module=self.module, owner=pl_module)
        return pairs, intervals

    def _request(self, trainer: Trainer) -> TeacherRequest:
        progress = self._progress(trainer)
        with_intervals, alone = self.distillation.interval_phase(*progress)
        return TeacherRequest(
            output=bool(self.distillation.weight_kd) and not alone,
            hidden=bool(self._loss.feature_weight(*progress)) and not alone,
            runs=with_intervals,
        )

    def _install(self, pl_module: LightningModule) -> None:
        self._student.install()
        self._undo = [self._student.remove]
        if pl_module.automatic_optimization:
            name, replacement = (
                "training_step",
                wrap_training_step(
                    pl_module.training_step,
                    start=self._student.clear,
                    loss=lambda loss: self.loss(loss, pl_module),
                ),
            )
        else:
            name, replacement = (
                "manual_backward",
                wrap_manual_backward(
                    pl_module.manual_backward, loss=lambda loss: self._reached(loss, pl_module)
                ),
            )
        self._undo.append(replace_method(pl_module, name, replacement))

    # -- losses ---------------------------------------------------------------------------------
    def loss(self, user_loss: Tensor, pl_module: LightningModule) -> Tensor:
        """The recovery loss of the calls since the last one; `user_loss` if there were none."""
        return self._recovery_loss(user_loss, self._student.take(), pl_module)

    def _reached(self, user_loss: Tensor, pl_module: LightningModule) -> Tensor:
        """The recovery loss of the calls that `user_loss` depends on (manual optimization)."""
        calls, again = self._student.take_reached(user_loss)
        if again:
            rank_zero_warn(
                "Several losses passed to manual_backward depend on the same call of "
                f"'{self.module}'. Distillation was added to the first of them only. If that is "
                "not the loss that trains the module, call it once for each loss."
            )
        return self._recovery_loss(user_loss, calls, pl_module)

    def _recovery_loss(
        self, user_loss: Tensor, calls: list[StudentCall], pl_module: LightningModule
    ) -> Tensor:
        if not calls:
            return user_loss
        step, num_steps = self._progress(pl_module.trainer)
        total, terms = self._loss(user_loss, calls, self._student, step=step, num_steps=num_steps)
        pl_module.log_dict({f"train/{name}": value.detach() for name, value in terms.items()})
        return total

    def _progress(self, trainer: Trainer) -> tuple[int, int]:
        """Current step and number of steps (1 if the fit has no end and nothing anneals)."""
        total = trainer.estimated_stepping_batches
        num_steps = self.anneal_steps or (1 if total == float("inf") else int(total))
        return self._steps.current(trainer), num_steps

    # -- batches --------------------------------------------------------------------------------
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the step that the batch starts at."""
        self._step_before = trainer.global_step
        self._trains = False

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Note whether the batch trains the student."""
        student_ids = {id(p) for p in self._student.student.parameters()}
        self._trains |= pl_module.automatic_optimization or any(
            id(p) in student_ids for g in optimizer.param_groups for p in g["params"]
        )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Check that the calls of the batch were used, and let the teacher rest."""
        self._steps.num_stepped += trainer.global_step > self._step_before
        unused = len(self._student.calls) if not pl_module.automatic_optimization else 0
        self._student.clear()
        if self._trains:
            check_called(self._student, module=self.module)
        if unused and self._trains:
            rank_zero_warn(
                f"No loss passed to self.manual_backward depends on {unused} calls of "
                f"'{self.module}', so nothing was distilled from them."
            )
        self._teacher.rest()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the student was called."""
        if self._steps.num_stepped:
            check_called(self._student, module=self.module)

    # -- ending, checkpoints --------------------------------------------------------------------
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the hooks and restore the module's method."""
        self._remove()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Remove the hooks and restore the module's method."""
        self._remove()

    def _remove(self) -> None:
        for undo in self._undo:
            undo()
        self._undo = []

    def state_dict(self) -> dict[str, Any]:
        """The step count."""
        return {"num_batches_stepped": self._steps.num_stepped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the step count of a checkpoint."""
        self._steps.restore(state_dict["num_batches_stepped"])
