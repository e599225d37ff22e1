"""Recovery of a pruned model by distillation, for any LightningModule (TinyFusion, section 3.4)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from tinyfusion_pl.distill import Distillation, check_pairs, collecting, output_loss
from tinyfusion_pl.pruning import Decision


class DistillationCallback(Callback):
    """Adds output and masked representation distillation to the loss of a LightningModule.

    Each call that `training_step` makes to `module` is repeated on the teacher with the same inputs and no graph. Then
    ``loss = weight_data * user_loss + weight_kd * kd + weight_feature(step) * feature``; the terms of several calls are averaged.
    It replaces the loss that `training_step` returns (a tensor, or a dict with "loss"); with manual optimization, the one given to
    `manual_backward`. Calls without gradients or in evaluation mode are ignored. See docs/recovery.md.

    Args:
        teacher: The dense model, of the student's class; put in evaluation mode and frozen. Never part of the LightningModule.
        module: Path of the student in the LightningModule.
        weight_kd, weight_data, weight_feature, num_sigma, feature_mask, pairs: See `Distillation`.
        decision: The decision the student came from, for the layer pairs (`DepthPruningCallback.decision`).
        anneal_steps: Optimizer steps in which the feature weight falls to 0; default: all of the fit.
        device: Where the teacher runs; default: the device of the LightningModule.
        offload: Move the teacher to the CPU after each batch.

    Example::

        recovery = DistillationCallback(teacher, module="transformer", decision=pruning.decision)
        Trainer(max_steps=10_000, callbacks=[recovery]).fit(module)
    """

    def __init__(self, teacher: nn.Module, *, module: str = "transformer", weight_kd: float = 0.9, weight_data: float = 0.1,
                 weight_feature: float = 1e-2, num_sigma: float = 2.0, feature_mask: str = "reference", pairs: Any = None,
                 decision: Decision | None = None, anneal_steps: int | None = None, device: Any = None, offload: bool = False) -> None:
        self.distillation = Distillation(weight_kd=weight_kd, weight_data=weight_data, weight_feature=weight_feature,
                                         num_sigma=num_sigma, feature_mask=feature_mask, pairs=pairs)
        if anneal_steps is not None and not (isinstance(anneal_steps, int) and anneal_steps >= 1):
            raise ValueError(f"anneal_steps is {anneal_steps}; give a count of optimizer steps >= 1, or leave it out for the whole fit.")
        self.pairs = self.distillation.pairs
        if self.pairs is None and decision is not None:
            self.pairs = {path.removeprefix(f"{module}."): stack.layer_pairs() for path, stack in decision.stacks.items()}
        if self.pairs is None and weight_feature:
            raise ValueError("Representation distillation needs layer pairs: give decision= or pairs=, or set weight_feature=0.")
        self.teacher = teacher.eval().requires_grad_(False)
        self.module, self.anneal_steps, self.device, self.offload = module, anneal_steps, device, offload
        self._undo: list[Any] = []
        self._called = False

    # -- attaching ----------------------------------------------------------------------------------------------------------------------
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        student = self._student(pl_module)
        mine = {id(p) for p in student.parameters()}
        if any(id(p) in mine for p in self.teacher.parameters()):
            raise ValueError(f"The teacher shares parameters with '{self.module}', the model that trains. Give the dense model, or a copy.")
        if any(module is self.teacher for module in pl_module.modules()):
            raise ValueError(f"The teacher is a submodule of {type(pl_module).__name__}, so it would go into checkpoints. Keep it outside.")
        check_pairs(self.pairs or {}, student, getattr(self.teacher, "_orig_mod", self.teacher))
        for name, each in student.named_modules():
            rate = getattr(each, "dropout_prob", 0)
            if "label" in type(each).__name__.lower() and isinstance(rate, (int, float)) and rate > 0:
                raise ValueError(f"'{self.module}.{name}' drops labels at random inside forward (dropout_prob={rate}), which the teacher "
                                 "cannot repeat. Set its dropout_prob to 0 and drop labels in training_step.")
        if any(isinstance(each, nn.Dropout) and each.p > 0 for each in student.modules()):
            rank_zero_warn(f"'{self.module}' has dropout; the teacher runs without it.")
        if self.anneal_steps is None and self.distillation.weight_feature and trainer.estimated_stepping_batches == float("inf"):
            raise ValueError("The fit has no end, so weight_feature cannot fall to 0. Give anneal_steps, or max_steps to the Trainer.")
        self._called = False
        self._install(trainer, pl_module, student)

    def _student(self, pl_module: LightningModule) -> nn.Module:
        try:
            found = pl_module.get_submodule(self.module)
        except AttributeError:
            names = ", ".join(name for name, _ in pl_module.named_children()) or "none"
            raise ValueError(f"{type(pl_module).__name__} has no submodule '{self.module}'. It has: {names}. Give module=.") from None
        return getattr(found, "_orig_mod", found)

    def _install(self, trainer: Trainer, pl_module: LightningModule, student: nn.Module) -> None:
        outer, open_calls = pl_module.get_submodule(self.module), []

        @torch._dynamo.disable
        def before(module, args, kwargs):
            if torch._C._current_graph_task_id() != -1:  # activation checkpointing runs the module again in backward
                return
            counts = torch.is_grad_enabled() and student.training and trainer.training
            pairs = (self.pairs or {}) if self._feature_weight(trainer) else {}
            collector = collecting(student, pairs, 0) if counts else None
            open_calls.append((collector, collector and collector.__enter__(), pairs))

        @torch._dynamo.disable
        def after(module, args, kwargs, output):
            if torch._C._current_graph_task_id() != -1 or not open_calls:
                return
            collector, hidden, pairs = open_calls.pop()
            if collector is None:
                return
            collector.__exit__(None, None, None)
            if output is not None:
                self._called = True
                self._calls.append((output, *self._ask_teacher(args, kwargs, pairs), hidden, pairs))

        self._calls: list[tuple] = []
        handles = [outer.register_forward_pre_hook(before, with_kwargs=True),
                   outer.register_forward_hook(after, with_kwargs=True, always_call=True)]
        self._undo = [handle.remove for handle in handles]
        for name, wrap in (("manual_backward", self._wrap_backward),) if not pl_module.automatic_optimization else (
                           ("training_step", self._wrap_step),):
            own = pl_module.__dict__.get(name)
            setattr(pl_module, name, wrap(pl_module, getattr(pl_module, name)))
            self._undo.append(functools.partial(pl_module.__dict__.__setitem__, name, own) if own is not None
                              else functools.partial(pl_module.__dict__.pop, name, None))

    def _wrap_step(self, pl_module: LightningModule, original: Any) -> Any:
        @functools.wraps(original)
        def training_step(*args, **kwargs):
            self._calls.clear()
            result = original(*args, **kwargs)
            if isinstance(result, Tensor):
                return self.loss(result, pl_module)
            if isinstance(result, dict) and isinstance(result.get("loss"), Tensor):
                return {**result, "loss": self.loss(result["loss"], pl_module)}
            return result  # None skips the batch
        return training_step

    def _wrap_backward(self, pl_module: LightningModule, original: Any) -> Any:
        @functools.wraps(original)
        def manual_backward(loss, *args, **kwargs):
            return original(self.loss(loss, pl_module), *args, **kwargs)
        return manual_backward

    # -- losses -------------------------------------------------------------------------------------------------------------------------
    def loss(self, user_loss: Tensor, pl_module: LightningModule) -> Tensor:
        """The whole loss, from the calls since the last one; `user_loss` itself where there were none."""
        calls, self._calls[:] = list(self._calls), []
        if not calls:
            return user_loss
        distillation, kd, feature = self.distillation, None, None
        if distillation.weight_kd:
            kd = torch.stack([output_loss(output, theirs) for output, theirs, *_ in calls]).mean()
        if any(pairs for *_, pairs in calls):
            feature = torch.stack([distillation.feature_losses(self._all_found(hidden, pairs), theirs, pairs).mean()
                                   for _, _, theirs, hidden, pairs in calls]).mean()
        terms = distillation.total(user_loss, kd=kd, feature=feature, feature_weight=self._feature_weight(pl_module.trainer))
        total = terms.pop("loss")
        pl_module.log_dict({f"train/{name}": value.detach() for name, value in terms.items()})
        return total

    def _all_found(self, hidden: Any, pairs: Any) -> Any:
        for path, of_path in pairs.items():
            for block, _ in of_path:
                states = hidden[path].get(block)
                if states is None or not (states if isinstance(states, Tensor) else states[0]).requires_grad:
                    raise ValueError(f"Block {block} of '{self.module}.{path}' gave no hidden states with a gradient. Reentrant activation "
                                     "checkpointing (use use_reentrant=False), blocks compiled before fit, or frozen weights do that.")
        return hidden

    def _feature_weight(self, trainer: Trainer) -> float:
        if not self.distillation.weight_feature:
            return 0.0
        num_steps = self.anneal_steps or int(trainer.estimated_stepping_batches)
        return self.distillation.feature_weight(min(trainer.global_step, num_steps - 1), num_steps)

    def _ask_teacher(self, args: tuple, kwargs: dict, pairs: Any) -> tuple[Any, Any]:
        if not (self.distillation.weight_kd or pairs):
            return None, {}
        like = next(self.teacher.parameters())
        if like.device != self._device:
            self.teacher.to(self._device)
            like = next(self.teacher.parameters())
        args, kwargs = _moved((args, kwargs), like)
        devices = [like.device] if like.device.type == "cuda" else []
        bare = getattr(self.teacher, "_orig_mod", self.teacher)
        with torch.no_grad(), torch.random.fork_rng(devices), collecting(bare, pairs, 1) as hidden:
            return self.teacher(*args, **kwargs), {path: dict(found) for path, found in hidden.items()}

    # -- batches ------------------------------------------------------------------------------------------------------------------------
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._device = torch.device(self.device) if self.device is not None else pl_module.device

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._calls.clear()
        if not self._called:
            raise ValueError(f"training_step did not call '{self.module}' with gradients in training mode, so there is nothing to distill. "
                             "Give module= the path of the model that it calls, and put that in training mode.")
        if self.offload:
            self.teacher.to("cpu")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._remove()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._remove()

    def _remove(self) -> None:
        for undo in self._undo:
            undo()
        self._undo = []


def _moved(tree: Any, like: Tensor) -> Any:
    """`tree` with its tensors on the device of `like`; floating-point ones in its dtype, but timesteps and the like (1-D) in their own."""
    if isinstance(tree, Tensor):
        return tree.to(like.device, like.dtype if tree.is_floating_point() and tree.ndim > 1 else tree.dtype)
    if isinstance(tree, dict):
        return {key: _moved(value, like) for key, value in tree.items()}
    return type(tree)(_moved(value, like) for value in tree) if type(tree) in (tuple, list) else tree
