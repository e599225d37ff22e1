"""What depth pruning asks of the Trainer and of the training step."""

from __future__ import annotations

from collections.abc import Callable

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from tinyfusion_pl.pruning import DepthGates

GATES = "depth_gates"
"""Name under which the gates are a child of the LightningModule."""


def check_strategy(trainer: Trainer) -> None:
    """`ValueError` for a strategy that shards parameters."""
    if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
        raise ValueError(f"DepthPruningCallback needs whole parameters on every rank, which {type(trainer.strategy).__name__} does not "
                         "keep. Use strategy='auto' or 'ddp'.")  # fmt: skip


def check_callbacks(trainer: Trainer, pruning: Callback, pl_module: LightningModule, check: Callable[[LightningModule], None]) -> None:
    """`ValueError` for weight averaging that would copy the module before it has gates or a model."""
    averaging = [c for c in trainer.callbacks if isinstance(c, WeightAveraging)]
    for callback in averaging:
        if trainer.callbacks.index(callback) < trainer.callbacks.index(pruning):
            raise ValueError(
                f"{type(callback).__name__} is listed before DepthPruningCallback. It copies the module as it finds it, so it would "
                "average a model without gates. List DepthPruningCallback first."
            )
    if averaging and not is_overridden("configure_model", pl_module, LightningModule):
        try:
            check(pl_module)
        except ValueError as error:
            raise ValueError(
                f"{error} If the model is built in setup: {type(averaging[0]).__name__} copies the module before that and would average "
                "nothing; build the model in __init__ or configure_model."
            ) from None


def check_trained(gates: DepthGates, paths: list[str], *, ever: bool = False) -> None:
    """`ValueError` where a training step has not run the gated blocks; with `ever`, where none has given the logits a gradient."""
    if ever or not any(gated.plans for gated in gates.gated_forwards):
        raise ValueError("The gate logits never got a gradient: the training step does not run the gated blocks "
                         f"({', '.join(paths)}), or runs them without a graph. Name the blocks that it runs: stacks=PATH.")  # fmt: skip


def averaged_modules(trainer: Trainer) -> list[nn.Module]:
    """The averaged modules of the Trainer's weight averaging callbacks."""
    models = [callback._average_model for callback in trainer.callbacks if isinstance(callback, WeightAveraging)]
    return [model.module for model in models if model is not None]
