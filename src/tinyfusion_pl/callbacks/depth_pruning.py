"""Depth pruning by learned masks for any LightningModule (TinyFusion, arXiv 2412.01199)."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from tinyfusion_pl.callbacks import gate_setup, search_losses
from tinyfusion_pl.callbacks.gate_attachment import GateAttachment
from tinyfusion_pl.callbacks.gate_checkpoint import learned_state, load_learned_state
from tinyfusion_pl.models import save_shallow
from tinyfusion_pl.pruning.target import check_target


class DepthPruningCallback(GateAttachment):
    """Learns which blocks of a model to remove while it trains, and saves a shallow model.

    Works with any LightningModule, whether it builds its model in ``__init__``, ``setup`` or
    ``configure_model``. During ``fit`` the callback

    - adds gates to the blocks and, for LoRA, adapters to the linear layers,
    - draws a mask for each sample of a batch and anneals the temperature,
    - steps the gate logits with their own optimizer, and logs the decision.

    When fit ends, it freezes the decision: `shallow_model` is a copy without the dropped blocks,
    with its original or its updated weights, and is saved in `save_dir`. The keys of the module's
    own checkpoints do not change. The first training call verifies that gating blocks off gives
    the same output as removing them.

    List it before Lightning's weight averaging callbacks. Supports the strategies ``auto``, ``ddp``
    and ``fsdp2`` (with full or frozen weights; see docs/strategies.md), not FSDP1 or DeepSpeed.

    Args:
        pattern: ``"N:M"`` keeps N of every M blocks, e.g. ``"1:2"`` or, mixed, ``"3:4+2:4"``. A
            mapping from stack path gives one for each stack.
        keep: How many units of each stack to keep, instead of `pattern`: a count, a fraction in
            (0, 1), or a mapping from stack path.
        stacks: Path or paths of the block lists in the LightningModule, e.g. ``"model.blocks"``.
            Default: discovered.
        weight_update: What trains besides the gates: ``"lora"`` (rank 8, alpha 16), ``"full"``,
            ``"frozen"``, or a peft config.
        delta_w: ``"discard"`` restores the original weights of the kept blocks (published),
            ``"merge"`` keeps the learned ones.
        search_loss: ``"data"`` uses the module's own loss (published). ``"teacher"`` uses the
            distance to the output of the original weights; only for `MaskLearning`.
        relaxation, straight_through, multiplier_lr: How masks are drawn and differentiated, see
            `Relaxation`.
        tau_start, tau_end: Temperature at the first and the last step, > 0 (published: 4, 0.1).
        anneal_steps: Number of optimizer steps between them. Default: the whole fit.
        scaling: Factor on the logits, > 0 (published: 100).
        init: Initial value of the logits (published: 0.02).
        average_decay: Decay of the moving average of the logits that decides (published: 0.999).
        logits_lr: Learning rate of AdamW for the logits, > 0 (published: 1e-3, no weight decay).
        logits_clip: Maximum gradient norm of the logits, > 0 (published: 1.0).
        max_nonfinite: Number of consecutive steps with a non-finite loss or gradient that stops
            the run.
        units: For each stack, lists of blocks that are only removed together (see `DepthGates`).
            Default: stated by the model.
        streams: For a stack path, the names of the block arguments that are hidden states, in the
            order in which the block returns them. Default: discovered.
        gather: Run dropped samples without a graph (exact and cheaper).
        verify: Verify gates in the first training call, which takes a few forward passes.
        save_dir: Folder of the shallow model. Default: ``<trainer.default_root_dir>/shallow``.
        decisions_path: File that gets a line of JSON at each logged step. Default: none.
        model_factory: How `load_shallow` builds the dense model,
            ``{"name": "timm/vit_tiny...", "kwargs": {...}}``. This project's models state it
            themselves; otherwise `load_shallow` needs the dense model as an argument.
        source: Origin of the weights, e.g. ``{"path": ..., "sha256": ...}``, stored in the record.

    Attributes:
        shallow_model: The pruned model, once fit has ended.
        decision: The final `Decision`, once training has ended.

    Example::

        pruning = DepthPruningCallback("1:2", stacks="model.blocks")
        Trainer(max_steps=1000, callbacks=[pruning]).fit(module)
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Attach the gates, or postpone that until ``configure_model`` has built the model."""
        if stage != "fit":
            return
        self.check_strategy(trainer)
        gate_setup.check_callbacks(trainer, self, pl_module, self.check)
        search_losses.check(pl_module, self.search_loss)
        if self.pruner.finds(pl_module):
            self.attach(trainer, pl_module)
        else:
            gate_setup.attach_after_configuring(pl_module, self.pruner, self.attach)

    # -- training -------------------------------------------------------------------------------
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the output folder, store the weights to restore, start the gate optimizer."""
        gate_setup.check_set_up(pl_module, self.pruner)
        if trainer.is_global_zero:
            check_target(gate_setup.get_folder(trainer, self.save_dir), self._model(pl_module))
        # Again, because the module's setup or a checkpoint of dense weights may have set weights.
        if not self._remembered:
            self.pruner.weight_update.remember(self._model(pl_module))
            self._remembered = True
        search_losses.start(pl_module, self.search_loss, self.pruner)
        self.decision, self.monitor.logged_step = None, -1
        self._start(trainer)

    def _start(self, trainer: Trainer) -> None:
        gates = self._attached_gates
        gate_setup.keep_out(trainer.optimizers, gates.logits())
        self.optimizer.start(gates)
        self._steps.start()
        self._num_anneal_steps, self._steps.follows_trainer = gate_setup.annealed_over(
            trainer, self.anneal_steps
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that gated blocks train; handle blocks compiled after the gates were attached."""
        gate_setup.check_training(self._attached_gates)
        self.pruner.see_through(pl_module, self._compiler)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Anneal the temperature and draw the masks of the batch."""
        self.optimizer.anneal(self._steps.current(trainer), self._num_anneal_steps)
        self._attached_gates.redraw()
        self._stepped = False

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor
    ) -> None:
        """Record whether the loss is finite, and report on the first batch."""
        self.guard.on_before_backward(trainer, pl_module, loss)
        self._first_batch.ran(self._attached_gates, loss)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Set the logits' gradients aside: they step once per batch, however many optimizers do."""
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
        """Step the logits and log the decision."""
        self._steps.num_stepped += self._stepped
        if self.optimizer.step():
            if self.monitor.is_due(trainer):
                self._log(trainer)
        elif self._stepped and pl_module.automatic_optimization:
            gate_setup.check_trained(self._attached_gates, self.pruner.paths())

    def _log(self, trainer: Trainer) -> None:
        self.monitor.log(
            trainer,
            self._attached_gates.decide(),
            tau=self._attached_gates.tau,
            scaling=self.pruner.options["scaling"],
            num_skipped=self.guard.num_skipped,
        )

    # -- end of fit -------------------------------------------------------------------------------
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide, before weight averaging callbacks replace the learned logits by averages."""
        self.guard.on_train_end(trainer, pl_module)
        self._first_batch.close()
        trained = self._steps.num_stepped > self._steps.num_before
        if trained and not self.optimizer.num_updates and not self.guard.num_skipped:
            gate_setup.check_trained(self._attached_gates, self.pruner.paths(), ever=True)
        self.decision = self._attached_gates.decide()
        if self.optimizer.num_updates and self.monitor.logged_step != trainer.global_step:
            self._log(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze the decision and save the shallow model."""
        self.guard.on_fit_end(trainer, pl_module)
        if self.decision is None:  # resumed at the last step: on_train_end did not run
            self.decision = self._attached_gates.decide()
        self._first_batch.close()
        self.shallow_model = self.freeze(pl_module)
        if trainer.is_global_zero:
            folder = gate_setup.get_folder(trainer, self.save_dir)
            save_shallow(folder, self.shallow_model, self.record())
            kept = ", ".join(f"{path} {each}" for path, each in self.decision.kept_blocks.items())
            rank_zero_info(
                f"DepthPruningCallback kept {kept} and saved the shallow model to {folder}"
            )
        trainer.strategy.barrier()

    # -- checkpoints ----------------------------------------------------------------------------
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save what was learned; nothing if there was no fit."""
        if self.gates is not None:
            checkpoint[type(self).__name__] = {
                **learned_state(trainer, pl_module, self.pruner),
                "optimizer": self.optimizer.state_dict(),
                "guard": self.guard.state_dict(),
                "num_batches_stepped": self._steps.num_stepped,
            }

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore what was learned, if this is a fit."""
        if trainer.state.fn != "fit" or (state := checkpoint.get(type(self).__name__)) is None:
            return
        load_learned_state(trainer, pl_module, self.pruner, state)
        self.optimizer.load_state_dict(state["optimizer"])
        self.guard.load_state_dict(state["guard"])
        self._steps.restore(state["num_batches_stepped"])
        self._remembered = True
        if trainer.strategy.restore_checkpoint_after_setup:  # then also after on_fit_start
            self._start(trainer)
