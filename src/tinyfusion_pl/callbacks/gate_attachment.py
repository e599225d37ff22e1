"""What `DepthPruningCallback` does outside the Trainer's hooks: settings, attaching, freezing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from tinyfusion_pl.callbacks import gate_setup, search_losses
from tinyfusion_pl.callbacks.first_batch import FirstBatch
from tinyfusion_pl.callbacks.gate_monitor import GateMonitor
from tinyfusion_pl.callbacks.nonfinite import NonFiniteGuard
from tinyfusion_pl.callbacks.step_count import StepCount, check_anneal_steps
from tinyfusion_pl.pruning import Decision, DepthGates
from tinyfusion_pl.pruning.compiled import Compiler
from tinyfusion_pl.pruning.gate_optimizer import GateOptimizer
from tinyfusion_pl.pruning.pruner import DepthPruner
from tinyfusion_pl.pruning.relaxations import Relaxation


class GateAttachment(Callback):
    """Attaches gates to a LightningModule, and freezes what they decide.

    See `DepthPruningCallback` for the arguments.
    """

    def __init__(
        self,
        pattern: str | Mapping[str, str] | None = None,
        *,
        keep: float | Mapping[str, float] | None = None,
        stacks: str | Sequence[str] | None = None,
        weight_update: Any = "lora",
        delta_w: str = "discard",
        search_loss: str = "data",
        relaxation: str = "gumbel",
        straight_through: str = "all",
        multiplier_lr: float = 1e-2,
        tau_start: float = 4.0,
        tau_end: float = 0.1,
        anneal_steps: int | None = None,
        scaling: float = 100.0,
        init: float = 0.02,
        average_decay: float = 0.999,
        logits_lr: float = 1e-3,
        logits_clip: float = 1.0,
        max_nonfinite: int = 10,
        units: Any = None,
        streams: Mapping[str, Sequence[str]] | None = None,
        gather: bool = True,
        verify: bool = True,
        save_dir: str | Path | None = None,
        decisions_path: str | Path | None = None,
        model_factory: Mapping[str, Any] | None = None,
        source: Mapping[str, Any] | None = None,
    ) -> None:
        drawn = Relaxation(
            relaxation, straight_through=straight_through, multiplier_lr=multiplier_lr
        )
        tau_start, tau_end = drawn.taus(tau_start, tau_end, anneal_steps)
        self.optimizer = GateOptimizer(
            lr=logits_lr, clip=logits_clip, tau_start=tau_start, tau_end=tau_end
        )
        self.pruner = DepthPruner(
            pattern,
            keep=keep,
            stacks=stacks,
            weight_update=weight_update,
            delta_w=delta_w,
            units=units,
            streams=streams,
            held=True,
            gather=gather,
            scaling=scaling,
            init=init,
            average_decay=average_decay,
            tau=tau_start,
            relaxation=drawn,
        )
        self.search_loss = search_losses.check_name(search_loss)
        check_anneal_steps(anneal_steps)
        self.anneal_steps, self.save_dir = anneal_steps, save_dir
        self.model_factory, self.source = model_factory, source
        self.monitor = GateMonitor(decisions_path)
        self.guard = NonFiniteGuard(max_consecutive=max_nonfinite)
        self.shallow_model: nn.Module | None = None
        self.decision: Decision | None = None
        self._first_batch = FirstBatch(verify=verify)
        self._compiler: Compiler | None = None  # of a LightningModule that is itself compiled
        self._steps = StepCount()
        self._num_anneal_steps = 1
        self._stepped = False  # whether an optimizer stepped, or skipped its step, in this batch
        self._remembered = False  # whether the weights to restore are known
        self._sources: Mapping[str, Any] = {}

    @property
    def gates(self) -> DepthGates | None:
        """The gates, once they are attached."""
        return self.pruner.gates

    @property
    def _attached_gates(self) -> DepthGates:
        assert self.pruner.gates is not None, "no gates are attached"
        return self.pruner.gates

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add adapters and gates to the model of `pl_module`, unless they are attached already."""
        if gate_setup.is_attached(pl_module, self.gates):
            return
        self._compiler = gate_setup.attach(trainer, pl_module, self.pruner)
        self._sources = self.source or getattr(self._model(pl_module), "source", None) or {}
        self._first_batch.expect(pl_module, self._attached_gates, self.pruner.paths())

    def detach(self, pl_module: LightningModule) -> None:
        """Remove gates and adapters; `delta_w` decides which weights `pl_module` keeps."""
        delattr(pl_module, gate_setup.GATES)
        self._first_batch.close()
        self.pruner.stop(pl_module)
        gate_setup.close_compiled_module(pl_module, self._compiler)
        self.optimizer.forget()
        self._remembered = False

    def check(self, pl_module: LightningModule) -> None:
        """Check budget, stacks, units, adapters and search loss against `pl_module`.

        Raises:
            ValueError: if one does not fit. `pl_module` stays unchanged.
        """
        search_losses.check(pl_module, self.search_loss)
        self.pruner.check(pl_module)

    def check_strategy(self, trainer: Trainer) -> None:
        """Raise `ValueError` if the callback does not support the Trainer's strategy."""
        gate_setup.check_strategy(trainer, self.pruner, self.search_loss)

    def _model(self, pl_module: LightningModule) -> nn.Module:
        return self.pruner.model(pl_module)

    def freeze(self, pl_module: LightningModule) -> nn.Module:
        """A copy of the model without gates, adapters and dropped blocks."""
        return self.pruner.freeze(pl_module, self.decision)

    def record(self) -> dict[str, Any]:
        """The record of the shallow model: decision, source, configuration and seed."""
        assert self.decision is not None, "the record needs a decision"
        return {
            "stacks": self.decision.as_dict(),
            "source": dict(self._sources),
            "seed": torch.initial_seed(),
            "model_factory": None if self.model_factory is None else dict(self.model_factory),
            "configuration": {
                **self.pruner.configuration(),
                "search_loss": self.search_loss,
                **self.optimizer.configuration(),
                "num_steps": self._num_anneal_steps,
            },
            "num_skipped_steps": self.guard.num_skipped,
        }
