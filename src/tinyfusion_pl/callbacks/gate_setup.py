"""What depth pruning asks of the Trainer and of the training step."""

from __future__ import annotations

import types
from collections.abc import Callable, Collection, Iterable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.compile import from_compiled, to_uncompiled
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from tinyfusion_pl.pruning import DepthGates, DepthPruner
from tinyfusion_pl.pruning.compiled import Compiler

GATES = "depth_gates"
"""Name under which the gates are a child of the LightningModule."""


def check_strategy(trainer: Trainer, pruner: DepthPruner, search_loss: str) -> None:
    """`ValueError` for a strategy that shards parameters, and for what does not go with FSDP2, which may."""
    name = type(trainer.strategy).__name__
    if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy)):
        raise ValueError(f"DepthPruningCallback needs whole parameters on every rank, which {name} does not keep. Use strategy='auto', "
                         "'ddp' or 'fsdp2'.")  # fmt: skip
    if not shards(trainer):
        return
    if pruner.weight_update.kind not in ("full", "frozen"):
        raise ValueError(f"{name} shares out whole blocks, in which adapters would be weights of their own that no checkpoint knows. Give "
                         "weight_update='full' or 'frozen' (adapter=full, adapter=frozen), or trainer=ddp.")  # fmt: skip
    if search_loss == "teacher":
        raise ValueError(f"search_loss is 'teacher', which keeps the original weights whole on each process, while {name} shares out those "
                         "of the model. Give search_loss='data' (pruning.search_loss=data), or trainer=ddp.")  # fmt: skip
    if averaging := [
        type(each).__name__ for each in trainer.callbacks if isinstance(each, WeightAveraging)
    ]:
        raise ValueError(f"{averaging[0]} beside DepthPruningCallback averages weights and gate logits together, of which {name} shares "
                         "out only the weights. Leave it out of mask learning, or use trainer=ddp.")  # fmt: skip


def shards(trainer: Trainer) -> bool:
    """Whether the strategy leaves each process a share of the weights, and gradients of gate logits unreduced."""
    return isinstance(trainer.strategy, ModelParallelStrategy)


def open_compiled_module(pl_module: LightningModule) -> Compiler | None:
    """Let a LightningModule that was given to fit as ``torch.compile(module)`` run its steps eagerly; returns its compiler."""
    if pl_module._compiler_ctx is None:
        return None
    compiler = Compiler(pl_module._compiler_ctx["dynamo_ctx"])
    to_uncompiled(pl_module)
    for name in ("forward", "training_step", "validation_step", "test_step", "predict_step"):
        if getattr(vars(pl_module).get(name), "__func__", None) is getattr(type(pl_module), name):
            delattr(pl_module, name)  # the class has it
    return compiler


def close_compiled_module(pl_module: LightningModule, compiler: Compiler | None) -> None:
    """Undo `open_compiled_module`."""
    if compiler is not None:
        from_compiled(compiler(pl_module))


def check_callbacks(
    trainer: Trainer,
    pruning: Callback,
    pl_module: LightningModule,
    check: Callable[[LightningModule], None],
) -> None:
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


def attach_after_configuring(
    pl_module: LightningModule,
    pruner: DepthPruner,
    attach: Callable[[Trainer, LightningModule], None],
) -> None:
    """Attach once ``configure_model`` has run: it follows the module's ``setup`` and precedes the restoring of a checkpoint."""
    original = pl_module.configure_model

    def configure_model(module: LightningModule) -> None:
        original()
        if pruner.finds(module):
            del module.configure_model
            attach(module.trainer, module)
        elif module.trainer is not None and module.trainer.state.fn == "fit":
            pruner.find(module)  # still nothing: raise the reason

    pl_module.configure_model = types.MethodType(configure_model, pl_module)


def is_attached(pl_module: LightningModule, gates: DepthGates | None) -> bool:
    """Whether `gates` are on `pl_module`; `ValueError` where those of another callback are."""
    found = getattr(pl_module, GATES, None)
    if found is not None and found is not gates:
        raise ValueError(f"{type(pl_module).__name__} carries the gates of an earlier DepthPruningCallback. Take them off with its "
                         "detach(module), prune a fresh module, or fit again with that callback.")  # fmt: skip
    return found is not None


def attach(trainer: Trainer, pl_module: LightningModule, pruner: DepthPruner) -> Compiler | None:
    """Put adapters and gates on the model of `pl_module`; returns the compiler of a module that was compiled itself."""
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
    """Steps over which the temperature falls, and whether they count the steps of all optimizers.

    Raises:
        ValueError: when the Trainer does not know how long it trains and `anneal_steps` is None.
    """
    if anneal_steps is not None:
        return anneal_steps, False
    if not 0 < trainer.estimated_stepping_batches < float("inf"):
        raise ValueError("The number of training steps is not known, so the temperature cannot be annealed over it. "
                         "Give max_steps to the Trainer or anneal_steps to DepthPruningCallback.")  # fmt: skip
    num_steps = int(trainer.estimated_stepping_batches)
    return num_steps, num_steps == trainer.max_steps  # an epoch's length counts batches


def report_unverified(paths: Collection[str]) -> None:
    """Warn of stacks whose first call was not verified."""
    if paths:
        rank_zero_warn(f"The training step runs the blocks of {', '.join(sorted(paths))} without calling a module that holds them, so "
                       "dropping them by gates was not checked against cutting them out.")  # fmt: skip


def check_set_up(pl_module: LightningModule, pruner: DepthPruner) -> None:
    """`ValueError` where there are no gates, or not on the blocks that there are now."""
    if pruner.gates is None or getattr(pl_module, GATES, None) is None:
        raise ValueError(
            "No gates were attached: the model did not exist after configure_model. Name the block list's path."
        )
    pruner.check_attached(pl_module)


def check_training(gates: DepthGates) -> None:
    """`ValueError` for gated blocks in evaluation mode."""
    if still := [gated.name for gated in gates.gated_forwards if not gated.block.training]:
        raise ValueError(f"{len(still)} gated blocks are in evaluation mode ({', '.join(still[:3])}, ...), where gates draw no "
                         "masks and nothing is learned. Call train() on the model before fit; dropout in the blocks can be set "
                         "to 0.")  # fmt: skip


def keep_out(
    optimizers: Iterable[torch.optim.Optimizer], parameters: Iterable[nn.Parameter]
) -> None:
    """Take `parameters` out of all parameter groups."""
    theirs = {id(p) for p in parameters}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in theirs]


def check_trained(gates: DepthGates, paths: list[str], *, ever: bool = False) -> None:
    """`ValueError` where a training step has not run the gated blocks; with `ever`, where none has given the logits a gradient."""
    if ever or not any(gated.plans for gated in gates.gated_forwards):
        raise ValueError("The gate logits never got a gradient: the training step does not run the gated blocks "
                         f"({', '.join(paths)}), or runs them without a graph. Name the blocks that it runs: stacks=PATH.")  # fmt: skip


def averaged_modules(trainer: Trainer) -> list[nn.Module]:
    """The averaged modules of the Trainer's weight averaging callbacks."""
    models = [
        callback._average_model
        for callback in trainer.callbacks
        if isinstance(callback, WeightAveraging)
    ]
    return [model.module for model in models if model is not None]
