"""Depth pruning by learned masks, for any LightningModule (TinyFusion, arXiv 2412.01199)."""

from __future__ import annotations

import copy
import json
import math
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from tinyfusion_pl.callbacks.nonfinite import NonFiniteGuard
from tinyfusion_pl.models import save_shallow
from tinyfusion_pl.pruning import Decision, DepthGates, Pattern, WeightUpdate, linear_anneal, remove_blocks, remove_gates
from tinyfusion_pl.pruning.adapters import adapter_state, check_delta_w, load_adapter_state
from tinyfusion_pl.pruning.blocks import by_path, get_stack, units_of
from tinyfusion_pl.pruning.discovery import resolve_stacks

GATES = "depth_gates"


class DepthPruningCallback(Callback):
    """Learn which blocks of a model can go while it trains, and leave a shallow model when fit ends.

    Works with any LightningModule, whether its model is built in ``__init__``, ``setup`` or ``configure_model``. In `fit` it puts gates on
    the blocks (and adapters on the linear layers), samples a mask for each sample, anneals the temperature, steps the gate logits with an
    optimizer of its own, logs the decision, and on the end of fit freezes it: a copy of the model without the dropped blocks, with its
    original weights (or the updated ones), in `shallow_model` and in `save_dir`. The module's own checkpoints keep their keys.

    List it before Lightning's weight averaging callbacks. It needs whole parameters on every rank (``auto``, ``ddp``; not FSDP or
    DeepSpeed). Hidden states must be batch first.

    Args:
        pattern: ``"N:M"``, N kept of every M blocks, e.g. ``"1:2"``, mixed with a plus sign ``"3:4+2:4"``; or a mapping from stack path.
        stacks: Path or paths of the block lists in the LightningModule, e.g. ``"model.blocks"``; default: found.
        weight_update: What trains beside the gates: ``"lora"`` (rank 8, alpha 16), ``"full"``, ``"frozen"``, or a peft config.
        delta_w: ``"discard"``: kept blocks get their original weights back (published); ``"merge"``: they keep what they learned.
        tau_start, tau_end: Temperature at the first and the last step, > 0 (published: 4, 0.1).
        anneal_steps: Optimizer steps from one to the other; default: all of the fit.
        scaling: Factor on the logits, > 0 (published: 100).
        init: Initial logits (published: 0.02).
        average_decay: Decay of the average of the logits that decides (published: 0.999).
        logits_lr: Learning rate of AdamW on the logits, > 0 (published: 1e-3; no weight decay).
        logits_clip: Largest gradient norm of the logits, > 0 (published: 1.0).
        max_nonfinite: Steps with non-finite loss or gradient in a row after which the run stops.
        units: Blocks that only go together, per stack (see `DepthGates`); default: what the model states.
        gather: Run dropped samples without a graph (exact and cheaper).
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
        self, pattern: str | Mapping[str, str], *, stacks: str | Sequence[str] | None = None, weight_update: Any = "lora",
        delta_w: str = "discard", tau_start: float = 4.0, tau_end: float = 0.1, anneal_steps: int | None = None, scaling: float = 100.0,
        init: float = 0.02, average_decay: float = 0.999, logits_lr: float = 1e-3, logits_clip: float = 1.0, max_nonfinite: int = 10,
        units: Any = None, gather: bool = True, save_dir: str | Path | None = None, decisions_path: str | Path | None = None,
        model_factory: Mapping[str, Any] | None = None, source: Mapping[str, Any] | None = None,
    ) -> None:
        for each in pattern.values() if isinstance(pattern, Mapping) else [pattern]:
            Pattern.parse(each)
        positive = {"tau_start": tau_start, "tau_end": tau_end, "scaling": scaling, "logits_lr": logits_lr, "logits_clip": logits_clip}
        if wrong := {name: value for name, value in positive.items() if not (_is_number(value) and value > 0)}:
            raise ValueError(f"These must be numbers > 0: {', '.join(f'{k}={v}' for k, v in wrong.items())} "
                             "(published: tau 4 to 0.1, scaling 100, logits_lr 1e-3, logits_clip 1).")
        if not (_is_number(average_decay) and 0 <= average_decay < 1):
            raise ValueError(f"average_decay is {average_decay}; give a number in [0, 1) (published: 0.999).")
        if not _is_number(init):
            raise ValueError(f"init is {init}; give the number that every logit starts with (published: 0.02).")
        if anneal_steps is not None and not (isinstance(anneal_steps, int) and anneal_steps >= 1):
            raise ValueError(f"anneal_steps is {anneal_steps}; give a count of optimizer steps >= 1, or leave it out for the whole fit.")
        check_delta_w(delta_w)
        self.pattern, self.stacks, self.delta_w = pattern, stacks, delta_w
        self.weight_update = WeightUpdate(weight_update)
        self.tau_start, self.tau_end, self.anneal_steps = tau_start, tau_end, anneal_steps
        self.logits_lr, self.logits_clip = logits_lr, logits_clip
        self.gate_options = {"scaling": scaling, "init": init, "average_decay": average_decay, "units": units, "gather": gather}
        self.save_dir, self.decisions_path = save_dir, None if decisions_path is None else Path(decisions_path)
        self.model_factory, self.source = model_factory, source
        self.guard = NonFiniteGuard(max_consecutive=max_nonfinite)
        self.shallow_model: nn.Module | None = None
        self.decision: Decision | None = None
        self.gates: DepthGates | None = None
        self._root = ""  # attribute of the LightningModule that holds all stacks; "" for the module itself
        self._optimizer: torch.optim.Optimizer | None = None
        self._optimizer_state: dict[str, Any] | None = None
        self._pending: list[torch.Tensor] | None = None  # gradients of the logits to step with at the batch's end
        self._stepped = False  # whether an optimizer stepped, or skipped its step, in this batch
        self._num_batches_stepped = self._num_updates = 0  # batches with an optimizer step; steps of the logits
        self._logged_step = -1
        self._restored = self._remembered = False
        self._sources: Mapping[str, Any] = {}

    # -- attaching ----------------------------------------------------------------------------------------------------------------------
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
            raise ValueError(f"DepthPruningCallback needs whole parameters on every rank, which {type(trainer.strategy).__name__} does not "
                             "keep. Use strategy='auto' or 'ddp'.")
        for callback in trainer.callbacks:
            if callback is self:
                break
            if isinstance(callback, WeightAveraging):
                raise ValueError(
                    f"{type(callback).__name__} is listed before DepthPruningCallback. It copies the module as it finds it, so it would "
                    "average a model without gates. List DepthPruningCallback first."
                )
        if self._find(pl_module) is None:
            averaging = next((type(c).__name__ for c in trainer.callbacks if isinstance(c, WeightAveraging)), None)
            if averaging is not None and not is_overridden("configure_model", pl_module, LightningModule):
                try:
                    resolve_stacks(pl_module, self.stacks, pattern=self.pattern)
                except ValueError as error:
                    raise ValueError(f"{error} If the model is built in setup: {averaging} copies the module before that and would average "
                                     "nothing; build the model in __init__ or configure_model.") from None
            self._attach_later(pl_module)
        else:
            self.attach(trainer, pl_module)

    def _find(self, pl_module: LightningModule) -> list[str] | None:
        """Paths of the stacks in `pl_module`; None while its model does not exist."""
        try:
            return resolve_stacks(pl_module, self.stacks, pattern=self.pattern)
        except ValueError:
            return None

    def _attach_later(self, pl_module: LightningModule) -> None:
        """Attach once ``configure_model`` has run: it follows the module's ``setup`` and precedes the restoring of a checkpoint."""
        original, callback = pl_module.configure_model, self

        def configure_model(module: LightningModule) -> None:
            original()
            if callback._find(module) is not None:
                del module.configure_model
                callback.attach(module.trainer, module)
            elif module.trainer is not None and module.trainer.state.fn == "fit":
                resolve_stacks(module, callback.stacks, pattern=callback.pattern)  # still nothing: say so

        pl_module.configure_model = types.MethodType(configure_model, pl_module)

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put adapters and gates on the model of `pl_module`; does nothing when this callback's are there."""
        if (found := getattr(pl_module, GATES, None)) is not None:
            if found is not self.gates:
                raise ValueError(f"{type(pl_module).__name__} carries the gates of an earlier DepthPruningCallback. Take them off with its "
                                 "detach(module), prune a fresh module, or fit again with that callback.")
            return
        self._root, patterns, units = self._plan(pl_module)
        model = pl_module.get_submodule(self._root)
        self.weight_update.start(model)
        self.gates = DepthGates(model, patterns, **{**self.gate_options, "units": units}, tau=self.tau_start, rank=trainer.global_rank)
        setattr(pl_module, GATES, self.gates)
        self._sources = self.source or getattr(model, "source", None) or {}

    def detach(self, pl_module: LightningModule) -> None:
        """Take gates and adapters off `pl_module`, which gets its original weights back or keeps what it learned (`delta_w`)."""
        model = self._model(pl_module)
        remove_gates(model)
        delattr(pl_module, GATES)
        self.weight_update.finish(model, delta_w=self.delta_w)
        self.gates = self._optimizer_state = None
        self._remembered = False

    def check(self, pl_module: LightningModule) -> None:
        """Find out whether pattern, stacks and units fit the model of `pl_module`, and change nothing.

        Raises:
            ValueError: when they do not; says what would.
        """
        self._plan(pl_module)

    def _plan(self, pl_module: LightningModule) -> tuple[str, dict[str, Pattern], dict[str, Any]]:
        """The attribute of `pl_module` that holds all stacks ("" for itself); pattern and units by the stacks' paths inside it."""
        paths = resolve_stacks(pl_module, self.stacks, pattern=self.pattern)
        heads = {path.partition(".")[0] for path in paths}
        root = heads.pop() if len(heads) == 1 and all("." in path for path in paths) else ""
        inside = {path: path.removeprefix(f"{root}.") if root else path for path in paths}  # a mapping may be keyed by either
        patterns, units = (
            by_path({inside.get(path, path): each for path, each in given.items()} if isinstance(given, Mapping) else given,
                    list(inside.values()), name) for name, given in {"pattern": self.pattern, "units": self.gate_options["units"]}.items())
        patterns = {path: Pattern.parse(pattern) for path, pattern in patterns.items()}
        for path, short in inside.items():
            counted = units_of(pl_module, path, units[short])
            try:
                patterns[short].groups(len(counted))
            except ValueError as error:
                what = "" if all(len(unit) == 1 for unit in counted) else f", where a pattern counts {len(counted)} units of several blocks"
                raise ValueError(f"Stack '{path}'{what}: {error} Each stack may have a pattern of its own, given by path.") from error
        return root, patterns, units

    # -- training -----------------------------------------------------------------------------------------------------------------------
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.gates is None or getattr(pl_module, GATES, None) is None:
            raise ValueError("No gates were attached: the model did not exist after configure_model. Name the block list's path.")
        owners = {gates.path: get_stack(self._model(pl_module), gates.path) for gates in self.gates.stacks}
        for path, stack in owners.items():
            if not any(getattr(block.__dict__.get("forward"), "__self__", None) is not None for block in stack):
                raise ValueError(f"The blocks at '{path}' were replaced after gates were put on them. Build the model once: in __init__, "
                                 "setup or configure_model.")
        if self.stacks is None and (found := resolve_stacks(pl_module, None, pattern=self.pattern)) != (gated := self._gated()):
            raise ValueError(f"Gates were put on {', '.join(gated)}, all that looked like blocks before the model was whole; now "
                             f"{', '.join(found)} does. Name the block list: stacks={found[0]!r}.")
        if not self._remembered:  # again, now that the module's setup has run and a checkpoint of dense weights may be restored
            self.weight_update.remember(self._model(pl_module))
            self._remembered = True
        self._pending, self.decision, self._num_updates, self._logged_step = None, None, 0, -1
        logits = {id(p) for p in self.gates.logits()}
        for optimizer in trainer.optimizers:  # the callback steps them itself: a group added now would break a scheduler
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in logits]
        self._optimizer = torch.optim.AdamW(self.gates.logits(), lr=self.logits_lr, weight_decay=0.0)
        if self._optimizer_state is not None:
            self._optimizer.load_state_dict(self._optimizer_state)
            self._optimizer_state = None  # of the run that goes on, not of a later fit
        if not self._restored:
            self._num_batches_stepped = 0
        self._restored, self._num_before = False, self._num_batches_stepped
        if self.anneal_steps is None and not 0 < trainer.estimated_stepping_batches < float("inf"):
            raise ValueError("The number of training steps is not known, so the temperature cannot be annealed over it. "
                             "Give max_steps to the Trainer or anneal_steps to DepthPruningCallback.")
        self._num_steps = self.anneal_steps or int(trainer.estimated_stepping_batches)
        # max_steps counts the steps of all optimizers, an epoch's length the batches.
        self._count_all = self.anneal_steps is None and self._num_steps == trainer.max_steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if still := [name for name, block in self._blocks(pl_module) if not block.training]:
            raise ValueError(f"{len(still)} gated blocks are in evaluation mode ({', '.join(still[:3])}, ...), where gates draw no "
                             "masks and nothing is learned. Call train() on the model before fit; dropout in the blocks can be set to 0.")

    def _blocks(self, pl_module: LightningModule) -> list[tuple[str, nn.Module]]:
        model = self._model(pl_module)
        return [(f"{gates.path}.{i}", block) for gates in self.gates.stacks for i, block in enumerate(get_stack(model, gates.path))]

    def _gated(self) -> list[str]:
        """Paths of the gated stacks in the LightningModule."""
        return [f"{self._root}.{gates.path}" if self._root else gates.path for gates in self.gates.stacks]

    def _model(self, pl_module: LightningModule) -> nn.Module:
        return pl_module.get_submodule(self._root)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step if self._count_all else self._num_batches_stepped
        self.gates.tau = linear_anneal(step, self._num_steps, start=self.tau_start, end=self.tau_end)
        self._stepped = False

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        self.guard.on_before_backward(trainer, pl_module, loss)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """Set the logits' gradients aside: several optimizers may step in one batch, the logits step once at its end."""
        self.guard.on_before_optimizer_step(trainer, pl_module, optimizer)
        self._stepped = True
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else scaler.get_scale()
        grads = [None if p.grad is None else p.grad / scale for p in self.gates.logits()]
        for p in self.gates.logits():
            p.grad = None
        if any(g is None for g in grads) or not torch.stack([torch.isfinite(g).all() for g in grads]).all():
            return
        self._pending = grads if self._pending is None else [a + b for a, b in zip(self._pending, grads)]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._num_batches_stepped += self._stepped
        if self._pending is not None:
            for p, grad in zip(self.gates.logits(), self._pending):
                p.grad = grad
            torch.nn.utils.clip_grad_norm_(self.gates.logits(), self.logits_clip)
            self._optimizer.step()
            self._optimizer.zero_grad()
            self._pending = None
            self._num_updates += 1
            self.gates.update_average()
            every = trainer.log_every_n_steps
            if every and (trainer.global_step % every == 0 or trainer.global_step == 1):
                self._log(trainer)

    def _log(self, trainer: Trainer) -> None:
        self._logged_step = trainer.global_step
        decision = self.gates.decide()
        groups = [group for stack in decision.stacks.values() for group in stack.groups]
        metrics = {
            "gates/tau": self.gates.tau, "gates/num_skipped": self.guard.num_skipped,
            "gates/entropy": sum(g.entropy for g in groups) / len(groups),
            "gates/confidence": sum(g.confidence for g in groups) / len(groups),
        }
        for path, stack in decision.stacks.items():
            for i, p in enumerate(stack.block_probabilities):
                metrics[f"gates/{path}/probability_{i}"] = p
                metrics[f"gates/{path}/kept_{i}"] = float(i in stack.kept_blocks)
            for i, group in enumerate(stack.groups):
                metrics[f"gates/{path}/entropy_{i}"] = group.entropy
                metrics[f"gates/{path}/confidence_{i}"] = group.confidence
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        if self.decisions_path is not None and trainer.is_global_zero:
            self.decisions_path.parent.mkdir(parents=True, exist_ok=True)
            line = {"step": trainer.global_step, "tau": self.gates.tau, "scaling": self.gate_options["scaling"],
                    "stacks": decision.telemetry()}
            with self.decisions_path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    # -- freezing -----------------------------------------------------------------------------------------------------------------------
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Here, before a weight averaging callback further down the list writes averaged logits over the learned ones.
        self.guard.on_train_end(trainer, pl_module)
        if self._num_batches_stepped > self._num_before and not self._num_updates and not self.guard.num_skipped:
            raise ValueError("The gate logits never got a gradient: the training step does not run the gated blocks "
                             f"({', '.join(self._gated())}), or runs them without a graph. Name the blocks that it runs: stacks=PATH.")
        self.decision = self.gates.decide()
        if self._num_updates and self._logged_step != trainer.global_step:
            self._log(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.guard.on_fit_end(trainer, pl_module)
        if self.decision is None:  # resumed from a checkpoint of the last step: there was nothing left to train
            self.decision = self.gates.decide()
        self.shallow_model = self.freeze(pl_module)
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir) / "shallow" if self.save_dir is None else Path(self.save_dir)
            save_shallow(folder, self.shallow_model, self.record())
            kept = ", ".join(f"{path} {blocks}" for path, blocks in self.decision.kept_blocks.items())
            rank_zero_info(f"DepthPruningCallback kept {kept}; the shallow model is in {folder}")
        trainer.strategy.barrier()

    def freeze(self, pl_module: LightningModule) -> nn.Module:
        """A copy of the model without gates, adapters and dropped blocks; the module itself stays as it is."""
        shallow = copy.deepcopy(self._model(pl_module))
        remove_gates(shallow)
        if isinstance(shallow, LightningModule):
            delattr(shallow, GATES)
        self.weight_update.finish(shallow, delta_w=self.delta_w)
        return remove_blocks(shallow, self.decision.kept_blocks)

    def record(self) -> dict[str, Any]:
        """What goes beside the shallow weights: decision, source, configuration, seed."""
        return {
            "stacks": self.decision.as_dict(),
            "source": dict(self._sources),
            "model_factory": None if self.model_factory is None else dict(self.model_factory),
            "configuration": {
                "weight_update": self.weight_update.describe(), "delta_w": self.delta_w, "tau_start": self.tau_start,
                "tau_end": self.tau_end, "num_steps": self._num_steps, "logits_lr": self.logits_lr, "logits_clip": self.logits_clip,
                **{k: v for k, v in self.gate_options.items() if k != "units"},
            },
            "num_skipped_steps": self.guard.num_skipped,
            "seed": torch.initial_seed(),
        }

    # -- checkpoints --------------------------------------------------------------------------------------------------------------------
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.gates is None:  # not fitted: nothing of this callback's is there
            return
        checkpoint[type(self).__name__] = {
            "gates": self.gates.gate_state(),
            "optimizer": None if self._optimizer is None else self._optimizer.state_dict(),
            "adapters": adapter_state(self._model(pl_module)),
            "original": self.weight_update.original,
            "guard": self.guard.state_dict(),
            "num_batches_stepped": self._num_batches_stepped,
            # Weight averaging keeps its average under the keys of the state dict, where neither logits nor adapters are.
            "averaged": [{"gates": getattr(average, GATES).gate_state(), "adapters": adapter_state(self._model(average))}
                         for average in _averages(trainer)],
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit" or (state := checkpoint.get(type(self).__name__)) is None:
            return
        self.gates.load_gate_state(state["gates"])
        load_adapter_state(self._model(pl_module), state["adapters"])
        self.weight_update.original = state["original"]
        self._optimizer_state = state["optimizer"]
        self.guard.load_state_dict(state["guard"])
        self._num_batches_stepped, self._restored, self._remembered = state["num_batches_stepped"], True, True
        for average, saved in zip(_averages(trainer), state["averaged"]):
            getattr(average, GATES).load_gate_state(saved["gates"])
            load_adapter_state(self._model(average), saved["adapters"])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _averages(trainer: Trainer) -> list[nn.Module]:
    """The averaged modules of the Trainer's weight averaging callbacks."""
    models = [callback._average_model for callback in trainer.callbacks if isinstance(callback, WeightAveraging)]
    return [model.module for model in models if model is not None]
