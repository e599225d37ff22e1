"""Depth pruning by learned masks, for any LightningModule (TinyFusion, arXiv 2412.01199)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from tinyfusion_pl.callbacks import gate_setup, search_losses
from tinyfusion_pl.callbacks.gate_checkpoint import learned_state, load_learned_state
from tinyfusion_pl.callbacks.gate_monitor import GateMonitor
from tinyfusion_pl.callbacks.gate_setup import GATES
from tinyfusion_pl.callbacks.nonfinite import NonFiniteGuard
from tinyfusion_pl.models import save_shallow
from tinyfusion_pl.pruning import Decision, DepthGates
from tinyfusion_pl.pruning.compiled import Compiler
from tinyfusion_pl.pruning.first_call import FirstCallCheck
from tinyfusion_pl.pruning.gate_optimizer import GateOptimizer
from tinyfusion_pl.pruning.pruner import DepthPruner
from tinyfusion_pl.pruning.relaxations import Relaxation
from tinyfusion_pl.pruning.target import check_target


class DepthPruningCallback(Callback):
    """Learn which blocks of a model can go while it trains, and leave a shallow model when fit ends.

    Works with any LightningModule, whether its model is built in ``__init__``, ``setup`` or ``configure_model``. In `fit` it puts gates on
    the blocks (and adapters on the linear layers), draws a mask for each sample of a batch, anneals the temperature, steps the gate logits
    with an optimizer of its own, logs the decision, and when fit ends freezes it: a copy of the model without the dropped blocks, with its
    original weights (or the updated ones), in `shallow_model` and in `save_dir`. The module's own checkpoints keep their keys.

    At the first training call of the model it is verified that dropping blocks by gates gives what cutting them out gives.

    List it before Lightning's weight averaging callbacks. Strategies are ``auto``, ``ddp`` and ``fsdp2`` (with full or frozen weights;
    docs/strategies.md); not FSDP1 or DeepSpeed.

    Args:
        pattern: ``"N:M"``, N kept of every M blocks, e.g. ``"1:2"``, mixed with a plus sign ``"3:4+2:4"``; or a mapping from stack path.
        keep: In place of `pattern`, how many of all units of a stack stay: a count, a share in (0, 1), or a mapping from stack path.
        stacks: Path or paths of the block lists in the LightningModule, e.g. ``"model.blocks"``; default: found.
        weight_update: What trains beside the gates: ``"lora"`` (rank 8, alpha 16), ``"full"``, ``"frozen"``, or a peft config.
        delta_w: ``"discard"``: kept blocks get their original weights back (published); ``"merge"``: they keep what they learned.
        search_loss: ``"data"``: the module's own loss (published); ``"teacher"``: the distance to the output of the model's original
            weights, for `MaskLearning` only, whose loss is the project's.
        relaxation, straight_through, multiplier_lr: What is drawn for a group, and how gradients reach the logits, see `Relaxation`.
        tau_start, tau_end: Temperature at the first and the last step, > 0 (published: 4, 0.1).
        anneal_steps: Optimizer steps from one to the other; default: all of the fit.
        scaling: Factor on the logits, > 0 (published: 100).
        init: Initial logits (published: 0.02).
        average_decay: Decay of the average of the logits that decides (published: 0.999).
        logits_lr: Learning rate of AdamW on the logits, > 0 (published: 1e-3; no weight decay).
        logits_clip: Largest gradient norm of the logits, > 0 (published: 1.0).
        max_nonfinite: Steps with non-finite loss or gradient in a row after which the run stops.
        units: Blocks that only go together, per stack (see `DepthGates`); default: what the model states.
        streams: For a stack path, the names of the block's arguments that are hidden states, in the order in which the block returns them;
            default: found.
        gather: Run dropped samples without a graph (exact and cheaper).
        verify: Check gates against cut blocks at the first training call (a few forward passes).
        save_dir: Folder of the shallow model; default: ``<trainer.default_root_dir>/shallow``.
        decisions_path: File that gets a line of JSON at each logged step; default: none.
        model_factory: How `load_shallow` builds the dense model, ``{"name": "timm/vit_tiny...", "kwargs": {...}}``; models of this project
            state it themselves. Without it `load_shallow` needs the dense model as an argument.
        source: What the model's weights came from, e.g. ``{"path": ..., "sha256": ...}``; goes into the record.

    Attributes:
        shallow_model: The pruned model, once fit has ended.
        decision: The final `Decision`, once training has ended.

    Example::

        trainer = Trainer(max_steps=1000, callbacks=[DepthPruningCallback("1:2", stacks="model.blocks")])
        trainer.fit(module)
    """

    def __init__(
        self, pattern: str | Mapping[str, str] | None = None, *, keep: Any = None, stacks: str | Sequence[str] | None = None,
        weight_update: Any = "lora", delta_w: str = "discard", search_loss: str = "data", relaxation: str = "gumbel",
        straight_through: str = "all", multiplier_lr: float = 1e-2, tau_start: float = 4.0, tau_end: float = 0.1,
        anneal_steps: int | None = None, scaling: float = 100.0, init: float = 0.02, average_decay: float = 0.999,
        logits_lr: float = 1e-3, logits_clip: float = 1.0, max_nonfinite: int = 10, units: Any = None,
        streams: Mapping[str, Sequence[str]] | None = None, gather: bool = True, verify: bool = True, save_dir: str | Path | None = None,
        decisions_path: str | Path | None = None, model_factory: Mapping[str, Any] | None = None, source: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        drawn = Relaxation(
            relaxation, straight_through=straight_through, multiplier_lr=multiplier_lr
        )
        tau_start, tau_end = drawn.taus(tau_start, tau_end, anneal_steps)
        self.optimizer = GateOptimizer(
            lr=logits_lr, clip=logits_clip, tau_start=tau_start, tau_end=tau_end
        )
        self.pruner = DepthPruner(
            pattern, keep=keep, stacks=stacks, weight_update=weight_update, delta_w=delta_w, units=units, streams=streams, held=True,
            gather=gather, scaling=scaling, init=init, average_decay=average_decay, tau=tau_start, relaxation=drawn,
        )  # fmt: skip
        self.search_loss = search_losses.check_name(search_loss)
        if anneal_steps is not None and not (isinstance(anneal_steps, int) and anneal_steps >= 1):
            raise ValueError(
                f"anneal_steps is {anneal_steps}; give a count of optimizer steps >= 1, or leave it out for the whole fit."
            )
        self.anneal_steps, self.verify, self.save_dir = anneal_steps, verify, save_dir
        self.model_factory, self.source = model_factory, source
        self.monitor, self.guard = (
            GateMonitor(decisions_path),
            NonFiniteGuard(max_consecutive=max_nonfinite),
        )
        self.shallow_model: nn.Module | None = None
        self.decision: Decision | None = None
        self._check: FirstCallCheck | None = None
        self._compiler: Compiler | None = None  # of a LightningModule that was compiled itself
        self._described = False
        self._stepped = False  # whether an optimizer stepped, or skipped its step, in this batch
        self._num_batches_stepped = 0
        self._restored = self._remembered = False
        self._sources: Mapping[str, Any] = {}

    @property
    def gates(self) -> DepthGates | None:
        """The gates, once they are attached."""
        return self.pruner.gates

    # -- attaching ------------------------------------------------------------------------------
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.check_strategy(trainer)
        gate_setup.check_callbacks(trainer, self, pl_module, self.check)
        search_losses.check(pl_module, self.search_loss)
        if self.pruner.finds(pl_module):
            self.attach(trainer, pl_module)
        else:
            gate_setup.attach_after_configuring(pl_module, self.pruner, self.attach)

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put adapters and gates on the model of `pl_module`; does nothing when this callback's are there."""
        if gate_setup.is_attached(pl_module, self.gates):
            return
        self._compiler, self._described = gate_setup.attach(trainer, pl_module, self.pruner), False
        self._sources = self.source or getattr(self._model(pl_module), "source", None) or {}
        if self.verify:
            self._check = FirstCallCheck(
                pl_module,
                self.gates,
                dict(zip((g.path for g in self.gates.stacks), self.pruner.paths())),
            )

    def detach(self, pl_module: LightningModule) -> None:
        """Take gates and adapters off `pl_module`, which gets its original weights back or keeps what it learned (`delta_w`)."""
        delattr(pl_module, GATES)
        self._end_check()
        self.pruner.stop(pl_module)
        gate_setup.close_compiled_module(pl_module, self._compiler)
        self.optimizer.forget()
        self._remembered = False

    def check(self, pl_module: LightningModule) -> None:
        """Find out whether budget, stacks, units, adapters and search loss fit `pl_module`, and change nothing.

        Raises:
            ValueError: when they do not; says what would.
        """
        search_losses.check(pl_module, self.search_loss)
        self.pruner.check(pl_module)

    def check_strategy(self, trainer: Trainer) -> None:
        """`ValueError` where the Trainer's strategy does not go with this callback."""
        gate_setup.check_strategy(trainer, self.pruner, self.search_loss)

    def _model(self, pl_module: LightningModule) -> nn.Module:
        return self.pruner.model(pl_module)

    def _folder(self, trainer: Trainer) -> Path:
        return (
            Path(trainer.default_root_dir) / "shallow"
            if self.save_dir is None
            else Path(self.save_dir)
        )

    # -- training -------------------------------------------------------------------------------
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        gate_setup.check_set_up(pl_module, self.pruner)
        if trainer.is_global_zero:
            check_target(self._folder(trainer), self._model(pl_module))
        if not self._remembered:  # again, now that the module's setup has run and a checkpoint of dense weights may be restored
            self.pruner.weight_update.remember(self._model(pl_module))
            self._remembered = True
        search_losses.start(pl_module, self.search_loss, self.pruner)
        self.decision, self.monitor.logged_step = None, -1
        self._start(trainer)

    def _start(self, trainer: Trainer) -> None:
        gate_setup.keep_out(
            trainer.optimizers, self.gates.logits()
        )  # they have an optimizer of their own
        self.optimizer.start(self.gates)
        if not self._restored:
            self._num_batches_stepped = 0
        self._restored, self._num_before = False, self._num_batches_stepped
        self._num_steps, self._count_all = gate_setup.annealed_over(trainer, self.anneal_steps)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        gate_setup.check_training(self.gates)
        self.pruner.see_through(pl_module, self._compiler)  # compiled since the gates were put on

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.optimizer.anneal(
            trainer.global_step if self._count_all else self._num_batches_stepped, self._num_steps
        )
        self.gates.redraw()
        self._stepped = False

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor
    ) -> None:
        self.guard.on_before_backward(trainer, pl_module, loss)
        # With NaN in the first batch there was nothing to compare: the next one is checked.
        if (
            not self._described
            and any(gated.plans for gated in self.gates.gated_forwards)
            and bool(loss.isfinite().all())
        ):
            self._described = True
            rank_zero_info(f"DepthPruningCallback: {self.gates.describe_batches()}")
        if self._check is not None and self._described and not self._check.postponed:
            gate_setup.report_unverified(self._check.unverified)
            self._end_check()

    def _end_check(self) -> None:
        if self._check is not None:
            self._check.remove()
            self._check = None

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Set the logits' gradients aside: several optimizers may step in one batch, the logits step once at its end."""
        self.guard.on_before_optimizer_step(trainer, pl_module, optimizer)
        self._stepped = True
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.optimizer.set_aside(
            scale=1.0 if scaler is None else scaler.get_scale(),
            reduce=trainer.strategy.reduce if gate_setup.shards(trainer) else None,
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._num_batches_stepped += self._stepped
        if self.optimizer.step():
            if self.monitor.is_due(trainer):
                self._log(trainer)
        elif self._stepped and pl_module.automatic_optimization:
            gate_setup.check_trained(self.gates, self.pruner.paths())

    def _log(self, trainer: Trainer) -> None:
        self.monitor.log(trainer, self.gates.decide(), tau=self.gates.tau, scaling=self.pruner.options["scaling"],
                         num_skipped=self.guard.num_skipped)  # fmt: skip

    # -- freezing -------------------------------------------------------------------------------
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Here, before a weight averaging callback further down the list writes averaged logits over the learned ones.
        self.guard.on_train_end(trainer, pl_module)
        self._end_check()
        if (
            self._num_batches_stepped > self._num_before
            and not self.optimizer.num_updates
            and not self.guard.num_skipped
        ):
            gate_setup.check_trained(self.gates, self.pruner.paths(), ever=True)
        self.decision = self.gates.decide()
        if self.optimizer.num_updates and self.monitor.logged_step != trainer.global_step:
            self._log(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.guard.on_fit_end(trainer, pl_module)
        if (
            self.decision is None
        ):  # resumed from a checkpoint of the last step: there was nothing left to train
            self.decision = self.gates.decide()
        self._end_check()
        self.shallow_model = self.freeze(pl_module)
        if trainer.is_global_zero:
            save_shallow(self._folder(trainer), self.shallow_model, self.record())
            kept = ", ".join(
                f"{path} {blocks}" for path, blocks in self.decision.kept_blocks.items()
            )
            rank_zero_info(
                f"DepthPruningCallback kept {kept}; the shallow model is in {self._folder(trainer)}"
            )
        trainer.strategy.barrier()

    def freeze(self, pl_module: LightningModule) -> nn.Module:
        """A copy of the model without gates, adapters and dropped blocks; the module itself stays as it is."""
        return self.pruner.freeze(pl_module, self.decision)

    def record(self) -> dict[str, Any]:
        """What goes beside the shallow weights: decision, source, configuration, seed."""
        return {
            "stacks": self.decision.as_dict(), "source": dict(self._sources), "seed": torch.initial_seed(),
            "model_factory": None if self.model_factory is None else dict(self.model_factory),
            "configuration": {**self.pruner.configuration(), "search_loss": self.search_loss, **self.optimizer.configuration(),
                              "num_steps": self._num_steps},
            "num_skipped_steps": self.guard.num_skipped,
        }  # fmt: skip

    # -- checkpoints ----------------------------------------------------------------------------
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.gates is not None:  # else not fitted: nothing of this callback's is there
            checkpoint[type(self).__name__] = {
                **learned_state(trainer, pl_module, self.pruner),
                "optimizer": self.optimizer.state_dict(),
                "guard": self.guard.state_dict(),
                "num_batches_stepped": self._num_batches_stepped,
            }

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn != "fit" or (state := checkpoint.get(type(self).__name__)) is None:
            return
        load_learned_state(trainer, pl_module, self.pruner, state)
        self.optimizer.load_state_dict(state["optimizer"])
        self.guard.load_state_dict(state["guard"])
        self._num_batches_stepped, self._restored, self._remembered = (
            state["num_batches_stepped"],
            True,
            True,
        )
        if trainer.strategy.restore_checkpoint_after_setup:  # and after the start of fit
            self._start(trainer)
