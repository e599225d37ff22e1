"""Saves gates and adapters, of the module and of its averages, in the Trainer's checkpoints."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from tinyfusion_pl.callbacks.gate_setup import GATES, averaged_modules
from tinyfusion_pl.pruning import DepthPruner
from tinyfusion_pl.pruning.adapter_state import adapter_state, load_adapter_state


def learned_state(
    trainer: Trainer, pl_module: LightningModule, pruner: DepthPruner
) -> dict[str, Any]:
    """Gates and adapters of the module and its averages, and the original weights."""
    return {
        **_state(pl_module, pruner),
        "original": pruner.weight_update.original,
        # Weight averaging saves the state dict of its average, which has no logits or adapters.
        "averaged": [_state(average, pruner) for average in averaged_modules(trainer)],
    }


def load_learned_state(
    trainer: Trainer, pl_module: LightningModule, pruner: DepthPruner, state: dict[str, Any]
) -> None:
    """Restore a state that `learned_state` returned."""
    _load(pl_module, pruner, state)
    pruner.weight_update.original = state["original"]
    for average, saved in zip(averaged_modules(trainer), state["averaged"]):
        _load(average, pruner, saved)


def _state(module: nn.Module, pruner: DepthPruner) -> dict[str, Any]:
    return {
        "gates": getattr(module, GATES).gate_state(),
        "adapters": adapter_state(pruner.model(module)),
    }


def _load(module: nn.Module, pruner: DepthPruner, state: dict[str, Any]) -> None:
    getattr(module, GATES).load_gate_state(state["gates"])
    load_adapter_state(pruner.model(module), state["adapters"])
