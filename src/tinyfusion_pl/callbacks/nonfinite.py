"""Skips optimizer steps with a non-finite loss or gradient on all ranks."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from tinyfusion_pl.pruning.sharding import local

REMEDY = (
    "Lower the learning rate, check the data for NaN, or train in a wider precision "
    "(trainer.precision=bf16-mixed or 32-true)."
)


class NonFiniteGuard(Callback):
    """Skips optimizer steps with a non-finite loss or gradient, and stops the run if all fail.

    The run stops after `max_consecutive` skipped steps in a row, counted for each optimizer, or if
    training ends without a single step.

    The flag is reduced over all ranks, so that every rank skips the same steps. A step is skipped
    by removing the gradients, because optimizers ignore parameters without one. Step counts and
    schedules advance, as in the published code. Under fp16 the gradient scaler skips steps with
    non-finite gradients, so only the loss is checked.

    Args:
        max_consecutive: Number of consecutive skipped steps that stops the run, >= 1.

    Attributes:
        num_skipped, num_taken: Number of steps skipped and taken so far.
    """

    def __init__(self, *, max_consecutive: int = 10) -> None:
        if max_consecutive < 1:
            raise ValueError(f"max_consecutive is {max_consecutive}; give an integer >= 1.")
        self.max_consecutive = max_consecutive
        self.num_skipped = self.num_taken = 0
        self.in_a_row: dict[int, int] = {}  # by the optimizer's index in the Trainer
        self.skipping = False
        self._bad_loss: Tensor | None = None

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Remember whether the loss is finite; accumulation has several losses per step."""
        bad = ~torch.isfinite(loss.detach()).all()
        self._bad_loss = bad if self._bad_loss is None else self._bad_loss | bad

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        """Remove all gradients if the step must be skipped."""
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        parameters = {id(p): p for group in optimizer.param_groups for p in group["params"]}
        parameters |= {id(p): p for p in pl_module.parameters()}
        grads = [p.grad for p in parameters.values() if p.grad is not None]
        bad = (
            torch.zeros((), dtype=torch.bool, device=pl_module.device)
            if self._bad_loss is None
            else self._bad_loss.to(pl_module.device)
        )
        if grads and not scaled:
            norms = torch._foreach_norm([local(grad) for grad in grads])
            stacked = torch.stack([norm.to(bad.device, torch.float32) for norm in norms])
            bad = bad | ~torch.isfinite(stacked).all()
        self._bad_loss = None
        bare = getattr(optimizer, "optimizer", optimizer)
        index = next((i for i, each in enumerate(trainer.optimizers) if each is bare), 0)
        self.skipping = bool(trainer.strategy.reduce(bad.float(), reduce_op="sum") > 0)
        if not self.skipping:
            self.in_a_row[index] = 0
            self.num_taken += 1
            return
        for parameter in parameters.values():
            parameter.grad = None
        self.num_skipped += 1
        self.in_a_row[index] = self.in_a_row.get(index, 0) + 1
        rank_zero_warn(
            f"Step {trainer.global_step}: the loss or a gradient is not finite; skipping the "
            f"optimizer step ({self.num_skipped} skipped so far)."
        )
        if self.in_a_row[index] >= self.max_consecutive:
            raise FloatingPointError(
                f"{self.in_a_row[index]} optimizer steps in a row had a non-finite loss or "
                f"gradient (last at step {trainer.global_step}). {REMEDY}"
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise `FloatingPointError` if every step was skipped."""
        if self.num_skipped and not self.num_taken:
            raise FloatingPointError(
                f"All {self.num_skipped} optimizer steps had a non-finite loss or gradient, so "
                f"nothing was learned. {REMEDY}"
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Repeat the check: a fit that resumes at its last step does not end a training."""
        self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The counts so far."""
        return {
            "num_skipped": self.num_skipped,
            "num_taken": self.num_taken,
            "in_a_row": dict(self.in_a_row),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the counts of a checkpoint."""
        self.num_skipped, self.num_taken = state_dict["num_skipped"], state_dict["num_taken"]
        self.in_a_row = dict(state_dict["in_a_row"])
