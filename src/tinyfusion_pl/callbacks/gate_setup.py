"""Attaches gates to a LightningModule, and checks the Trainer and the training step."""

from __future__ import annotations

import types
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.compile import from_compiled, to_uncompiled
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch._dynamo import OptimizedModule

from tinyfusion_pl.callbacks.replaced_method import replace_method
from tinyfusion_pl.callbacks.trainer_access import get_callbacks
from tinyfusion_pl.pruning import DepthGates, DepthPruner
from tinyfusion_pl.pruning.compiled import Compiler

GATES = "depth_gates"
"""Name of the LightningModule's child that holds the gates."""


def check_strategy(trainer: Trainer, pruner: DepthPruner, search_loss: str) -> None:
    """Raise `ValueError` for strategies, or settings under FSDP2, that are not supported."""
    name = type(trainer.strategy).__name__
    if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy)):
        raise ValueError(
            f"DepthPruningCallback needs full parameters on every rank, but {name} shards them. "
            "Use strategy='auto', 'ddp' or 'fsdp2'."
        )
    if not shards(trainer):
        return
    if pruner.weight_update.kind not in ("full", "frozen"):
        raise ValueError(
            f"{name} shards whole blocks, so checkpoints would miss the adapters inside them. Give "
            "weight_update='full' or 'frozen' (adapter=full, adapter=frozen), or trainer=ddp."
        )
    if search_loss == "teacher":
        raise ValueError(
            "search_loss is 'teacher', which keeps a full copy of the original weights on each "
            f"process, but {name} shards the model. Give search_loss='data' "
            "(pruning.search_loss=data), or trainer=ddp."
        )
    if averaging := _averaging(trainer):
        raise ValueError(
            f"{type(averaging[0]).__name__} averages weights and gate logits together, but {name} "
            "shards only the weights. Remove it from mask learning, or use trainer=ddp."
        )


def shards(trainer: Trainer) -> bool:
    """Whether the strategy shards the weights, and does not reduce the gradients of gate logits."""
    return isinstance(trainer.strategy, ModelParallelStrategy)


def open_compiled_module(pl_module: LightningModule) -> Compiler | None:
    """Run the steps of a LightningModule eagerly that was passed as ``torch.compile(module)``.

    Returns:
        Its compiler; None if it was not compiled.
    """
    if pl_module._compiler_ctx is None:
        return None
    compiler = Compiler(pl_module._compiler_ctx["dynamo_ctx"])
    to_uncompiled(pl_module)
    for name in ("forward", "training_step", "validation_step", "test_step", "predict_step"):
        # An instance attribute that only repeats the method of the class.
        if getattr(vars(pl_module).get(name), "__func__", None) is getattr(type(pl_module), name):
            delattr(pl_module, name)
    return compiler


def close_compiled_module(pl_module: LightningModule, compiler: Compiler | None) -> None:
    """Undo `open_compiled_module`."""
    if compiler is not None:
        from_compiled(cast(OptimizedModule, compiler(pl_module)))


def check_callbacks(
    trainer: Trainer,
    pruning: Callback,
    pl_module: LightningModule,
    check: Callable[[LightningModule], None],
) -> None:
    """Raise `ValueError` for weight averaging that copies the module before it has gates."""
    averaging, callbacks = _averaging(trainer), list(get_callbacks(trainer))
    for callback in averaging:
        if callbacks.index(callback) < callbacks.index(pruning):
            raise ValueError(
                f"{type(callback).__name__} is listed before DepthPruningCallback, so it would "
                "copy and average a model without gates. List DepthPruningCallback first."
            )
    if averaging and not is_overridden("configure_model", pl_module, LightningModule):
        try:
            check(pl_module)
        except ValueError as error:
            raise ValueError(
                f"{error} If the model is built in setup: {type(averaging[0]).__name__} copies the "
                "module before that and would average nothing. Build the model in __init__ or "
                "configure_model."
            ) from None


def attach_after_configuring(
    pl_module: LightningModule,
    pruner: DepthPruner,
    attach: Callable[[Trainer, LightningModule], None],
) -> None:
    """Call `attach` after the module's ``configure_model``.

    Lightning calls that after the module's ``setup`` and before it restores a checkpoint.
    """
    original = pl_module.configure_model

    def configure_model(module: LightningModule) -> None:
        original()
        if pruner.finds(module):
            del module.configure_model
            attach(module.trainer, module)
        elif module.trainer is not None and module.trainer.state.fn == "fit":
            pruner.find(module)  # raises the reason

    replace_method(pl_module, "configure_model", types.MethodType(configure_model, pl_module))


def is_attached(pl_module: LightningModule, gates: DepthGates | None) -> bool:
    """Whether `gates` are on `pl_module`; raise `ValueError` for gates of another callback."""
    found = getattr(pl_module, GATES, None)
    if found is not None and found is not gates:
        raise ValueError(
            f"{type(pl_module).__name__} has the gates of an earlier DepthPruningCallback. Remove "
            "them with its detach(module), prune a new module, or fit again with that callback."
        )
    return found is not None


def attach(trainer: Trainer, pl_module: LightningModule, pruner: DepthPruner) -> Compiler | None:
    """Add adapters and gates to the model of `pl_module`.

    Returns:
        The compiler of `pl_module`; None if it was not compiled.
    """
    compiler = open_compiled_module(pl_module)
    try:
        setattr(
            pl_module, GATES, pruner.start(pl_module, rank=trainer.global_rank, compiler=compiler)
        )
    except Exception:
        close_compiled_module(pl_module, compiler)
        raise
    for remark in pruner.remarks:
        rank_zero_info(f"DepthPruningCallback: {remark}")
    return compiler


def annealed_over(trainer: Trainer, anneal_steps: int | None) -> tuple[int, bool]:
    """Number of annealing steps, and whether they count the steps of all optimizers.

    Raises:
        ValueError: if `anneal_steps` is None and the length of the training is unknown.
    """
    if anneal_steps is not None:
        return anneal_steps, False
    if not 0 < trainer.estimated_stepping_batches < float("inf"):
        raise ValueError(
            "The number of training steps is unknown, so the temperature cannot be annealed over "
            "it. Give max_steps to the Trainer or anneal_steps to DepthPruningCallback."
        )
    num_steps = int(trainer.estimated_stepping_batches)
    # max_steps counts the steps of all optimizers, the length of an epoch counts batches.
    return num_steps, num_steps == trainer.max_steps


def report_unverified(paths: Collection[str]) -> None:
    """Warn about stacks whose first call could not be verified."""
    if paths:
        rank_zero_warn(
            f"The training step runs the blocks of {', '.join(sorted(paths))} without calling a "
            "module that contains them, so gating them was not verified against removing them."
        )


def check_set_up(pl_module: LightningModule, pruner: DepthPruner) -> None:
    """Raise `ValueError` if there are no gates, or they are not on the current blocks."""
    if pruner.gates is None or getattr(pl_module, GATES, None) is None:
        raise ValueError(
            "No gates were attached: the model did not exist after configure_model. Give the path "
            "of the block list, stacks=PATH."
        )
    pruner.check_attached(pl_module)


def check_training(gates: DepthGates) -> None:
    """Raise `ValueError` for gated blocks in evaluation mode."""
    if still := [gated.name for gated in gates.gated_forwards if not gated.block.training]:
        raise ValueError(
            f"{len(still)} gated blocks are in evaluation mode ({', '.join(still[:3])}, ...), "
            "where gates draw no masks and nothing is learned. Call train() on the model before "
            "fit; to train without dropout, set its rate to 0."
        )


def keep_out(
    optimizers: Iterable[torch.optim.Optimizer], parameters: Iterable[nn.Parameter]
) -> None:
    """Remove `parameters` from all parameter groups: the logits have their own optimizer."""
    theirs = {id(p) for p in parameters}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in theirs]


def check_trained(gates: DepthGates, paths: list[str], *, ever: bool = False) -> None:
    """Raise `ValueError` if a training step has not run the gated blocks.

    Args:
        gates: The gates.
        paths: Paths of the gated stacks, for the message.
        ever: Raise in any case: no step of the training gave the logits a gradient.
    """
    if ever or not any(gated.plans for gated in gates.gated_forwards):
        raise ValueError(
            "The gate logits never got a gradient: the training step does not run the gated blocks "
            f"({', '.join(paths)}), or runs them without a graph. Give the path of the blocks that "
            "it runs, stacks=PATH."
        )


def averaged_modules(trainer: Trainer) -> list[nn.Module]:
    """The averages of the Trainer's weight averaging callbacks."""
    models = [callback._average_model for callback in _averaging(trainer)]
    return [model.module for model in models if model is not None]


def get_folder(trainer: Trainer, save_dir: str | Path | None) -> Path:
    """Folder of the shallow model: `save_dir`, or ``shallow`` in the Trainer's root."""
    return Path(trainer.default_root_dir) / "shallow" if save_dir is None else Path(save_dir)


def _averaging(trainer: Trainer) -> list[WeightAveraging]:
    return [each for each in get_callbacks(trainer) if isinstance(each, WeightAveraging)]
