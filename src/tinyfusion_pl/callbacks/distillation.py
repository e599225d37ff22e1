"""Recovery of a pruned model by distillation, for any LightningModule (TinyFusion, section 3.4)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from tinyfusion_pl.callbacks.student_calls import StudentCall, StudentCalls
from tinyfusion_pl.callbacks.student_checks import check_student
from tinyfusion_pl.distill import (
    Distillation,
    Teacher,
    interval_loss,
    needs_grad,
    output_loss,
    resolve_intervals,
    resolve_pairs,
)
from tinyfusion_pl.distill.lift import GROUP_SIZE
from tinyfusion_pl.pruning import Decision


class DistillationCallback(Callback):
    """Adds output, masked representation and interval distillation to the loss of a LightningModule.

    Each call that `training_step` makes to `module` is made to the teacher too, with the same inputs and no graph. Then
    ``loss = weight_data * user_loss + weight_kd * kd + weight_feature(step) * feature``; the terms of several calls are averaged. It
    replaces the loss that `training_step` returns (a tensor, or a dict with "loss"); with manual optimization, the first loss given to
    `manual_backward` that depends on the call. Calls without gradients or in evaluation mode are ignored. See docs/recovery.md.

    Args:
        teacher: The dense model, of the student's class; put in evaluation mode and frozen. Never part of the LightningModule.
        module: Path of the student in the LightningModule.
        weight_kd, weight_data, weight_feature, num_sigma, feature_mask: See `Distillation`.
        pairs: For each stack path, (student block, teacher block) pairs; default: from `decision`.
        output_loss, group_size, weight_interval: See `Distillation`. Intervals need `decision`.
        interval_share: The same, of the fit (or of `anneal_steps`); the model runs in these steps too, and its loss counts nothing.
        channel_axis: For ``output_loss="lift"``, the axis of the channels in the tensors that the model returns, batch first: 1 for
            (N, C, ...), -1 for (N, T, C).
        decision: The decision the student came from (`DepthPruningCallback.decision`).
        anneal_steps: Optimizer steps in which the feature weight falls to 0; default: all of the fit.
        streams: For a stack path, the names of the block's arguments that are hidden states; default: found.
        device: Where the teacher runs; default: the device of the LightningModule.
        offload: Move the teacher to the CPU after each batch.

    Example::

        recovery = DistillationCallback(teacher, module="transformer", decision=pruning.decision)
        Trainer(max_steps=10_000, callbacks=[recovery]).fit(module)
    """

    def __init__(
        self, teacher: nn.Module, *, module: str = "transformer", weight_kd: float = 0.9, weight_data: float = 0.1,
        weight_feature: float = 1e-2, num_sigma: float = 2.0, feature_mask: str = "reference",
        pairs: Mapping[str, Sequence[Sequence[int]]] | None = None, decision: Decision | None = None, anneal_steps: int | None = None,
        streams: Mapping[str, Sequence[str]] | None = None, device: Any = None, offload: bool = False,
        output_loss: str = "mse", group_size: int = GROUP_SIZE, channel_axis: int = 1, weight_interval: float = 0.0,
        interval_share: float | None = None,
    ) -> None:  # fmt: skip
        self.distillation = Distillation(weight_kd=weight_kd, weight_data=weight_data, weight_feature=weight_feature,
                                         num_sigma=num_sigma, feature_mask=feature_mask, pairs=pairs,
                                         output_loss=output_loss, group_size=group_size, weight_interval=weight_interval,
                                         interval_share=interval_share)  # fmt: skip
        if decision is None and weight_interval:
            raise ValueError(
                "Interval distillation needs the decision that the student came from: give decision=, or weight_interval=0."
            )
        if isinstance(channel_axis, bool) or not isinstance(channel_axis, int) or channel_axis == 0:
            raise ValueError(
                f"channel_axis is {channel_axis!r}; give 1 for outputs (N, C, ...), -1 for (N, T, C): axis 0 is the batch."
            )
        self._distance = self.distillation.distance(channel_axis=channel_axis)
        if anneal_steps is not None and not (isinstance(anneal_steps, int) and anneal_steps >= 1):
            raise ValueError(
                f"anneal_steps is {anneal_steps}; give a count of optimizer steps >= 1, or leave it out for the whole fit."
            )
        if pairs is None and decision is None and weight_feature:
            raise ValueError(
                "Representation distillation needs layer pairs: give decision= or pairs=, or set weight_feature=0."
            )
        self.pairs, self.decision, self.streams = self.distillation.pairs, decision, streams
        self._teacher = Teacher(teacher, device=device, offload=offload)
        self.module, self.anneal_steps = module, anneal_steps
        self._student: StudentCalls | None = None
        self._undo: list[Callable[[], Any]] = []
        self._num_batches_stepped = 0
        self._restored = False

    @property
    def teacher(self) -> nn.Module:
        return self._teacher.model

    # -- attaching ------------------------------------------------------------------------------
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
            raise ValueError(
                f"DistillationCallback needs whole models on every process, which {type(trainer.strategy).__name__} does not "
                "keep. Use strategy='auto' or 'ddp'; or tinyfusion_pl.Recovery, which shares out student and teacher."
            )
        called = self._called(pl_module)
        student = getattr(called, "_orig_mod", called)
        check_student(student, self.teacher, pl_module, module=self.module)
        if not self._restored:
            self._num_batches_stepped = 0
        self._restored = False
        total = trainer.estimated_stepping_batches
        ends = self.distillation.weight_feature or self.distillation.interval_share is not None
        if self.anneal_steps is None and ends and total == float("inf"):
            raise ValueError("The fit has no end, so weight_feature cannot fall to 0, and there is no share of its steps. Give "
                             "anneal_steps, or max_steps to the Trainer.")  # fmt: skip
        # max_steps counts the steps of all optimizers, an epoch's length the batches.
        self._count_all = self.anneal_steps is None and total == trainer.max_steps
        pairs, intervals, bare = {}, {}, getattr(self.teacher, "_orig_mod", self.teacher)
        if self.distillation.weight_interval:
            intervals = resolve_intervals(
                self.decision, student, bare, module=self.module, owner=pl_module
            )
        if self.distillation.weight_feature:
            pairs = resolve_pairs(
                self.pairs or self.decision, student, bare, module=self.module, owner=pl_module
            )
        self._student = StudentCalls(
            called, student, self._teacher, pairs, streams=self.streams, is_training=lambda: trainer.training,
            asks=lambda: self._asks(trainer), device=lambda: pl_module.device, intervals=intervals,
        )  # fmt: skip
        self._install(pl_module)

    def _asks(self, trainer: Trainer) -> tuple[bool, bool, bool]:
        with_intervals, alone = self.distillation.interval_phase(*self._progress(trainer))
        return (
            bool(self.distillation.weight_kd) and not alone,
            bool(self._feature_weight(trainer)) and not alone,
            with_intervals,
        )

    def _called(self, pl_module: LightningModule) -> nn.Module:
        try:
            return pl_module.get_submodule(self.module)
        except AttributeError:
            names = ", ".join(name for name, _ in pl_module.named_children()) or "none"
            raise ValueError(
                f"{type(pl_module).__name__} has no submodule '{self.module}'. It has: {names}. Give module=."
            ) from None

    def _install(self, pl_module: LightningModule) -> None:
        self._student.install()
        self._undo = [self._student.remove]
        automatic = pl_module.automatic_optimization
        name, wrap = (
            ("training_step", self._wrap_step)
            if automatic
            else ("manual_backward", self._wrap_backward)
        )
        own = pl_module.__dict__.get(name)
        setattr(pl_module, name, wrap(pl_module, getattr(pl_module, name)))
        self._undo.append(functools.partial(pl_module.__dict__.__setitem__, name, own) if own is not None
                          else functools.partial(pl_module.__dict__.pop, name, None))  # fmt: skip

    def _wrap_step(self, pl_module: LightningModule, original: Callable) -> Callable:
        @functools.wraps(original)
        def training_step(*args, **kwargs):
            self._student.clear()
            result = original(*args, **kwargs)
            if isinstance(result, Tensor):
                return self.loss(result, pl_module)
            if isinstance(result, dict) and isinstance(result.get("loss"), Tensor):
                return {**result, "loss": self.loss(result["loss"], pl_module)}
            return result  # None skips the batch

        return training_step  # fmt: skip

    def _wrap_backward(self, pl_module: LightningModule, original: Callable) -> Callable:
        @functools.wraps(original)
        def manual_backward(loss, *args, **kwargs):
            calls, again = self._student.take_reached(loss)
            if again:
                rank_zero_warn(f"More than one loss given to manual_backward depends on the same call of '{self.module}'. Distillation was "
                               "added to the first of them only: call the module once for each loss where that is not the one that trains "
                               "it.")  # fmt: skip
            return original(self._whole_loss(loss, calls, pl_module), *args, **kwargs)

        return manual_backward  # fmt: skip

    # -- losses ---------------------------------------------------------------------------------
    def loss(self, user_loss: Tensor, pl_module: LightningModule) -> Tensor:
        """The whole loss, from the calls since the last one; `user_loss` itself where there were none."""
        return self._whole_loss(user_loss, self._student.take(), pl_module)

    def _whole_loss(
        self, user_loss: Tensor, calls: list[StudentCall], pl_module: LightningModule
    ) -> Tensor:
        if not calls:
            return user_loss
        distillation, kd, feature, interval = self.distillation, None, None, None
        if with_runs := [call for call in calls if call.runs is not None]:
            found = [
                interval_loss(self._student.student, call.runs, self._student.intervals).mean()
                for call in with_runs
            ]
            interval = torch.stack(found).mean()
        if distillation.interval_phase(*self._progress(pl_module.trainer))[1]:
            pl_module.log_dict({"train/loss_interval": interval.detach()})
            return (
                0.0 * user_loss + distillation.weight_interval * interval
            )  # of the user's loss: gradients, as DDP needs, all zero
        if distillation.weight_kd:
            kd = torch.stack(
                [
                    output_loss(call.output, call.teacher_output, distance=self._distance)
                    for call in calls
                ]
            ).mean()
        if with_states := [call for call in calls if call.hidden]:
            feature = torch.stack([self._feature_loss(call) for call in with_states]).mean()
        terms = distillation.total(user_loss, kd=kd, feature=feature, feature_weight=self._feature_weight(pl_module.trainer),
                                   interval=interval)  # fmt: skip
        total = terms.pop("loss")
        pl_module.log_dict({f"train/{name}": value.detach() for name, value in terms.items()})
        return total

    def _feature_loss(self, call: StudentCall) -> Tensor:
        pairs = self._student.pairs
        for path, of_path in pairs.items():
            for block, _ in of_path:
                place = f"Block {block} of '{self.module}.{path}'"
                if block not in call.outputs[path]:
                    raise ValueError(f"{place} did not run in a call of '{self.module}', so that its pair has no hidden "
                                     "states. Give pairs= "
                                     "of blocks that always run, or set weight_feature=0.")  # fmt: skip
                trained = any(
                    p.requires_grad
                    for p in self._student.outputs.collectors[path].blocks[block].parameters()
                )
                if trained and not needs_grad(call.outputs[path][block]):
                    raise ValueError(f"{place} gave no hidden states with a gradient, though it has weights to train: it ran under "
                                     "torch.no_grad, or reentrant activation checkpointing was given no input that requires a gradient "
                                     "(use use_reentrant=False).")  # fmt: skip
        return self.distillation.feature_losses(call.outputs, call.hidden, pairs).mean()

    def _feature_weight(self, trainer: Trainer) -> float:
        if not self.distillation.weight_feature:
            return 0.0
        step, num_steps = self._progress(trainer)
        return self.distillation.feature_weight(min(step, num_steps - 1), num_steps)

    def _progress(self, trainer: Trainer) -> tuple[int, int]:
        """Steps done, and those of the whole fit (1 where it has no end, and nothing depends on it)."""
        total = trainer.estimated_stepping_batches
        num_steps = self.anneal_steps or (1 if total == float("inf") else int(total))
        return (trainer.global_step if self._count_all else self._num_batches_stepped), num_steps

    # -- batches --------------------------------------------------------------------------------
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._step_before = trainer.global_step
        self._trains = False

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        mine = {id(p) for p in self._student.student.parameters()}
        self._trains |= pl_module.automatic_optimization or any(
            id(p) in mine for g in optimizer.param_groups for p in g["params"]
        )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._num_batches_stepped += trainer.global_step > self._step_before
        left = len(self._student.calls) if not pl_module.automatic_optimization else 0
        self._student.clear()
        if self._trains:
            self._check_called()
        if left and self._trains:
            rank_zero_warn(f"{left} calls of '{self.module}' were in no loss that was given to self.manual_backward, so nothing was "
                           "distilled from them.")  # fmt: skip
        self._teacher.rest()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._num_batches_stepped:
            self._check_called()

    def _check_called(self) -> None:
        if not self._student.num_recorded:
            raise ValueError(f"training_step did not call '{self.module}' with gradients in training mode, so there is nothing to distill. "
                             "Give module= the path of the model that it calls, and put that in training mode.")  # fmt: skip

    # -- ending, checkpoints --------------------------------------------------------------------
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._remove()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        for undo in self._undo:
            undo()
        self._undo = []

    def state_dict(self) -> dict[str, Any]:
        return {"num_batches_stepped": self._num_batches_stepped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._num_batches_stepped, self._restored = state_dict["num_batches_stepped"], True
