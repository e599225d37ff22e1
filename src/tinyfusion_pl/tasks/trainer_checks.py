"""Settings of a stage's Trainer that would break the stage, found before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ProgressBar, Timer, WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import nn

from tinyfusion_pl.callbacks import EMAWithWarmup, EvaluationCallback
from tinyfusion_pl.modules import Denoising

OWN = {  # argument -> what sets it
    "callbacks": "{stage}.fit.callbacks",
    "logger": "logger=csv, wandb, tensorboard or none",
    "default_root_dir": "run_dir",
}

SHARDED_PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-true")


def check_trainer(
    stage: str, factory: Callable[..., Trainer], callbacks: Mapping[str, Callback]
) -> Trainer:
    """Make the Trainer that `factory` makes, and return it.

    Raises:
        ValueError: for a setting that is ignored, that the Trainer refuses, or under which the stage would not be trained in full, or
            not resume as it was; names it.
    """
    key = f"{stage}.fit.trainer"
    given = getattr(factory, "keywords", {})
    for name in OWN:
        if name in given:
            instead = OWN[name].format(stage=stage)
            raise ValueError(
                f"{key}.{name} is {given[name]!r}, but the stage sets it. Leave it out; give {instead}."
            )
    for name, callback in callbacks.items():
        if isinstance(callback, EarlyStopping):
            raise ValueError(
                f"{stage}.fit.callbacks.{name} is {type(callback).__name__}, which ends the training before its last "
                f"step, while temperature and learning rate are scheduled up to that. Remove it, and set {key}.max_steps."
            )
    _check_off(key, given)
    bars = [name for name, callback in callbacks.items() if isinstance(callback, ProgressBar)]
    if bars and given.get("enable_progress_bar") is False:
        raise ValueError(
            f"{key}.enable_progress_bar is False, but {stage}.fit.callbacks.{bars[0]} is a progress bar. Leave it out, and set "
            f"{stage}.fit.callbacks.{bars[0]}=null."
        )
    try:
        trainer = factory(callbacks=list(callbacks.values()), logger=False)
    except Exception as error:  # Lightning refuses wrong settings by errors of many types
        wrong = [
            f"{key}.{name} is {value!r}"
            for name, value in given.items()
            if _is_refused(factory, {name: value})
        ]
        raise ValueError(f"{', '.join(wrong) or key}: {error}") from error
    _check_off(key, {
        "fast_dev_run": trainer.fast_dev_run, "overfit_batches": trainer.overfit_batches, "barebones": trainer.barebones,
        "enable_checkpointing": bool(trainer.checkpoint_callbacks),
    })  # fmt: skip
    for name, value, least in (
        ("accumulate_grad_batches", trainer.accumulate_grad_batches, 1),
        ("log_every_n_steps", trainer.log_every_n_steps, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{key}.{name} is {value!r}; give a count >= {least}.")
    clip = trainer.gradient_clip_val
    if clip is not None and not (math.isfinite(clip) and clip >= 0):
        raise ValueError(
            f"{key}.gradient_clip_val is {clip}; give a number > 0, or 0 or null for no clipping."
        )
    if isinstance(launcher := trainer.strategy.launcher, _MultiProcessingLauncher):
        raise ValueError(
            f"{key}.strategy is {given.get('strategy')!r}, which trains in processes made by {launcher._start_method}: "
            "what they learn does not come back to the stage. Give strategy=ddp or auto."
        )
    for timer in (each for each in trainer.callbacks if isinstance(each, Timer)):
        if (limit := timer.time_remaining()) is not None and limit <= 0:
            raise ValueError(
                f"{key}.max_time leaves no time for a single step. Give a longer one, or null."
            )
    return trainer


def check_sharded(
    stage: str, trainer: Trainer, callbacks: Mapping[str, Callback], module: Denoising
) -> None:
    """`ValueError` for what does not go with weights that are shared out over processes (``trainer=fsdp2``)."""
    if not isinstance(trainer.strategy, ModelParallelStrategy):
        return
    if (
        trainer.precision not in SHARDED_PRECISIONS
    ):  # Lightning looks only where it is given the strategy as an object
        raise ValueError(
            f"{stage}.fit.trainer.precision is {trainer.precision!r}, which Lightning does not have for sharded weights. Give "
            f"one of {', '.join(SHARDED_PRECISIONS)}, or trainer=ddp."
        )
    module.check_sharded()
    for name, callback in callbacks.items():
        key = f"{stage}.fit.callbacks.{name}"
        if isinstance(callback, EvaluationCallback):
            raise ValueError(
                f"{key} samples during training, with a number of batches that may differ between processes, while each call "
                f"of a shared block needs all of them. Set {key}=null, or trainer=ddp."
            )
        if isinstance(callback, WeightAveraging) and not isinstance(callback, EMAWithWarmup):
            raise ValueError(
                f"{key} is {type(callback).__name__}, which copies the whole model on every process. Give "
                "tinyfusion_pl.callbacks.EMAWithWarmup, whose average is shared out as the weights are; or trainer=ddp."
            )


def check_sampling_trainer(key: str, factory: Callable[..., Trainer]) -> Trainer:
    """Make the Trainer of a task that trains nothing, and return it.

    Raises:
        ValueError: for a setting that the Trainer refuses, or under which not all samples would be made; names it.
    """
    given = getattr(factory, "keywords", {})
    try:
        trainer = factory()
    except Exception as error:  # Lightning refuses wrong settings by errors of many types
        wrong = [
            f"{key}.{name} is {value!r}"
            for name, value in given.items()
            if _is_refused(factory, {name: value})
        ]
        raise ValueError(f"{', '.join(wrong) or key}: {error}") from error
    reasons = {
        "fast_dev_run": (False, "makes a single batch"),
        "limit_test_batches": (1.0, "leaves samples out"),
        "barebones": (False, "leaves out what is written"),
        "overfit_batches": (0, "is for training"),
        "default_root_dir": (None, "is the run's own folder"),
        "enable_checkpointing": (False, "has nothing to save"),
    }
    for name, (allowed, reason) in reasons.items():
        if (value := given.get(name)) is not None and value != allowed:
            raise ValueError(f"{key}.{name} is {value!r}, which {reason}. Leave it out.")
    if given.get("logger") not in (None, False):
        raise ValueError(
            f"{key}.logger is {given['logger']!r}, but numbers go to the run's own files. Leave it at false."
        )
    if isinstance(launcher := trainer.strategy.launcher, _MultiProcessingLauncher):
        raise ValueError(
            f"{key}.strategy is {given.get('strategy')!r}, whose processes are started from within this one "
            f"({launcher._start_method}): they would keep the numbers to themselves. Give strategy=ddp or auto."
        )
    return trainer


def check_optimizer(stage: str, module: Denoising, *, num_steps: int) -> None:
    """Make the optimizer and the scheduler of `module` once.

    Raises:
        ValueError: for settings that they refuse; names them.
    """
    parameters = [nn.Parameter(torch.zeros(1))]
    try:
        module.make_optimizers(parameters, num_steps=num_steps)
    except Exception as error:  # torch refuses settings by errors of several types
        factory = module.optimizer_factory
        key, given = f"{stage}.module.optimizer", getattr(factory, "keywords", {})
        wrong = [
            name
            for name, value in given.items()
            if _fails(factory.func, parameters, **{name: value})
        ]
        if wrong:
            raise ValueError(
                "; ".join(f"{key}.{name} is {given[name]!r}" for name in wrong) + f": {error}"
            ) from error
        if factory is not None and _fails(factory, parameters):
            raise ValueError(f"{key}: {error}") from error
        names = getattr(module.scheduler_factory, "keywords", {})
        about = next((name for name in names if str(error).startswith(name)), None)
        raise ValueError(
            f"{stage}.module.scheduler{':' if about is None else '.'}{' ' * (about is None)}{error}"
        ) from error


def _fails(function: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    try:
        function(*args, **kwargs)
    except Exception:
        return True
    return False


def _is_refused(factory: Any, setting: dict[str, Any]) -> bool:
    """Whether the Trainer refuses `setting` by itself."""
    try:
        factory.func(**{"logger": False, "enable_checkpointing": False} | setting)
    except Exception:
        return True
    return False


def _check_off(key: str, given: Mapping[str, Any]) -> None:
    """Raise a ValueError for the first setting of `given` that no stage can have."""
    reasons = {
        "fast_dev_run": (
            False,
            "trains a single batch and saves nothing. Set max_steps, or +debug=default, for a short run",
        ),
        "overfit_batches": (
            0,
            "replaces the order of samples, which the checkpoint holds. Set max_steps for a short run",
        ),
        "barebones": (False, "leaves out checkpoints and logs"),
        "enable_checkpointing": (True, "leaves the stage without a checkpoint to resume from"),
    }
    for name, (allowed, reason) in reasons.items():
        if (value := given.get(name)) is not None and value != allowed:
            raise ValueError(f"{key}.{name} is {value!r}, which {reason}. Leave it at {allowed}.")


def check_length(stage: str, trainer: Trainer, *, num_steps: int, accumulate: int) -> None:
    """Raise a ValueError where epochs, or a limit of their batches, keep `trainer` from `num_steps` whole steps."""
    key = f"{stage}.fit.trainer"
    endless = (
        trainer.max_steps == -1 and trainer.max_epochs == 1000
    )  # what Lightning sets where neither is given
    if trainer.max_epochs not in (None, -1) and not endless:
        raise ValueError(
            f"{key}.max_epochs is {trainer.max_epochs}, but the stage's length is its {num_steps} steps. "
            "Leave max_epochs at -1."
        )
    limit = trainer.limit_train_batches
    num_batches = num_steps * accumulate  # of the one epoch that a fit is
    num_batches = limit if isinstance(limit, int) else int(num_batches * limit)
    if num_batches < 1:
        raise ValueError(
            f"{key}.limit_train_batches is {limit}, which leaves no batch to train on. Leave it at 1.0."
        )
    if num_batches < num_steps * accumulate and num_batches % accumulate:
        raise ValueError(
            f"{key}.limit_train_batches is {limit}: every {num_batches} batches a step would see fewer than the "
            f"{accumulate} batches that are accumulated. Give a multiple of {accumulate}, or leave it at 1.0."
        )
