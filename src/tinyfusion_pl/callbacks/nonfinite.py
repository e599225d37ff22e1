"""Skips optimizer steps with a non-finite loss or gradient, on all ranks alike."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from tinyfusion_pl.pruning.sharding import local

REMEDY = "Lower the learning rate, check the data for NaN, or train in a wider precision (trainer.precision=bf16-mixed or 32-true)."


class NonFiniteGuard(Callback):
    """Skip an optimizer step whose loss or gradients are not finite; stop the run after too many in a row, or when it ends without a step.

    With several optimizers each one's steps are counted by themselves.

    The flag is reduced over all ranks, so that every rank skips the same step. Skipping takes the gradients away: optimizers leave
    parameters without a gradient alone. Steps and schedules go on counting, as in the published code. Under fp16 a gradient scaler does
    its own skipping, and only the loss is looked at.

    Args:
        max_consecutive: Skipped steps in a row after which the run stops, >= 1.

    Attributes:
        num_skipped, num_taken: Steps skipped and not skipped so far.
    """

    def __init__(self, *, max_consecutive: int = 10) -> None:
        if max_consecutive < 1:
            raise ValueError(f"max_consecutive is {max_consecutive}; give a count >= 1.")
        self.max_consecutive = max_consecutive
        self.num_skipped = self.num_taken = 0
        self.in_a_row: dict[int, int] = {}  # by the optimizer's place in the Trainer
        self.skipping = False
        self._bad_loss: Tensor | None = None

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        bad = ~torch.isfinite(loss.detach()).all()
        self._bad_loss = (
            bad if self._bad_loss is None else self._bad_loss | bad
        )  # several backwards a step when accumulating

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        """Take the gradients of the optimizer and of every other trainable parameter away where the step must be skipped."""
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
            bad = (
                bad
                | ~torch.isfinite(
                    torch.stack([n.to(bad.device, torch.float32) for n in norms])
                ).all()
            )
        self._bad_loss = None
        place = next(
            (
                i
                for i, each in enumerate(trainer.optimizers)
                if each is getattr(optimizer, "optimizer", optimizer)
            ),
            0,
        )
        self.skipping = bool(trainer.strategy.reduce(bad.float(), reduce_op="sum") > 0)
        if not self.skipping:
            self.in_a_row[place] = 0
            self.num_taken += 1
            return
        for parameter in parameters.values():
            parameter.grad = None
        self.num_skipped += 1
        self.in_a_row[place] = self.in_a_row.get(place, 0) + 1
        rank_zero_warn(
            f"Step {trainer.global_step}: the loss or a gradient is not finite; the optimizer step is skipped "
            f"({self.num_skipped} so far)."
        )
        if self.in_a_row[place] >= self.max_consecutive:
            raise FloatingPointError(
                f"{self.in_a_row[place]} optimizer steps in a row had a non-finite loss or gradient "
                f"(last at step {trainer.global_step}). {REMEDY}"
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.num_skipped and not self.num_taken:
            raise FloatingPointError(
                f"All {self.num_skipped} optimizer steps had a non-finite loss or gradient: nothing was learned. "
                f"{REMEDY}"
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_train_end(
            trainer, pl_module
        )  # a fit that resumes at its last step trains no more, and ends no training

    def state_dict(self) -> dict[str, Any]:
        return {
            "num_skipped": self.num_skipped,
            "num_taken": self.num_taken,
            "in_a_row": dict(self.in_a_row),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_skipped, self.num_taken = state_dict["num_skipped"], state_dict["num_taken"]
        self.in_a_row = dict(state_dict["in_a_row"])
