"""Steps of the gate logits: gradients set aside, penalties added, clipped, AdamW, the average that decides, and the temperature."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion_pl.pruning.gates import DepthGates
from tinyfusion_pl.pruning.tau_schedule import linear_anneal


class GateOptimizer:
    """An optimizer of its own for the logits: a parameter group added to the user's would break its scheduler.

    Args:
        lr: Learning rate of AdamW, > 0 (published: 1e-3; no weight decay).
        clip: Largest gradient norm, > 0 (published: 1.0).
        tau_start, tau_end: Temperature at the first and the last step, > 0 (published: 4, 0.1).
    """

    def __init__(
        self, *, lr: float = 1e-3, clip: float = 1.0, tau_start: float = 4.0, tau_end: float = 0.1
    ) -> None:
        positive = {
            "tau_start": tau_start,
            "tau_end": tau_end,
            "logits_lr": lr,
            "logits_clip": clip,
        }
        if wrong := {
            name: value for name, value in positive.items() if not (is_number(value) and value > 0)
        }:
            raise ValueError(f"These must be numbers > 0: {', '.join(f'{k}={v}' for k, v in wrong.items())} "
                             "(published: tau 4 to 0.1, logits_lr 1e-3, logits_clip 1).")  # fmt: skip
        self.lr, self.clip, self.tau_start, self.tau_end = lr, clip, tau_start, tau_end
        self.num_updates = 0
        self._gates: DepthGates | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._restored: dict[str, Any] | None = None
        self._pending: list[Tensor] | None = None  # gradients to step with at the batch's end

    def start(self, gates: DepthGates) -> None:
        """Begin a fit; goes on from the state that was loaded, once."""
        self._gates, self._pending, self.num_updates = gates, None, 0
        self._optimizer = torch.optim.AdamW(gates.logits(), lr=self.lr, weight_decay=0.0)
        if self._restored is not None:
            self._optimizer.load_state_dict(self._restored)
            self._restored = None  # of the run that is resumed, not of a later fit

    def anneal(self, step: int, num_steps: int) -> None:
        """Set the temperature of `step` of `num_steps`."""
        self._gates.tau = linear_anneal(step, num_steps, start=self.tau_start, end=self.tau_end)

    def set_aside(
        self, *, scale: float = 1.0, reduce: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """Take the logits' gradients away, to be stepped with later; several backward passes add up.

        Args:
            scale: What a gradient scaler has multiplied the loss with.
            reduce: Averages over processes what nothing else averages.
        """
        grads = [None if p.grad is None else p.grad / scale for p in self._logits]
        for p in self._logits:
            p.grad = None
        if any(g is None for g in grads):  # the step is skipped, on all processes alike
            return
        if reduce is not None:
            grads = [reduce(g) for g in grads]
        if not torch.stack([torch.isfinite(g).all() for g in grads]).all():
            return
        self._pending = (
            grads if self._pending is None else [a + b for a, b in zip(self._pending, grads)]
        )

    def step(self) -> bool:
        """Step with the gradients set aside and update the average; False where there were none."""
        if self._pending is None:
            return False
        for p, grad in zip(self._logits, self._pending):
            p.grad = grad
        for gates in self._gates.stacks:
            gates.add_penalties()
        torch.nn.utils.clip_grad_norm_(self._logits, self.clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._pending = None
        self.num_updates += 1
        self._gates.update_average()
        return True

    @property
    def _logits(self) -> list[nn.Parameter]:
        return self._gates.logits()

    def configuration(self) -> dict[str, Any]:
        """The settings, for a record."""
        return {
            "tau_start": self.tau_start,
            "tau_end": self.tau_end,
            "logits_lr": self.lr,
            "logits_clip": self.clip,
        }

    def state_dict(self) -> dict[str, Any] | None:
        """State of AdamW; None before `start`."""
        return self._restored if self._optimizer is None else self._optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Take back what `state_dict` gave, at the next `start`."""
        self._restored = state

    def forget(self) -> None:
        """Drop a loaded state that has not been used."""
        self._restored = None


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, (int, float)) and math.isfinite(value)
