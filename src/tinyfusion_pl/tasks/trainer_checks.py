"""Checks of a stage's Trainer settings before anything is trained."""

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
    """Create and return the Trainer of a stage.

    Raises:
        ValueError: for a setting that would be ignored, that the Trainer rejects, or that keeps the
            stage from training in full or from resuming; names it.
    """
    key = f"{stage}.fit.trainer"
    given = getattr(factory, "keywords", {})
    for name in OWN:
        if name in given:
            instead = OWN[name].format(stage=stage)
            raise ValueError(
                f"{key}.{name} is {given[name]!r}, but the stage sets it. Omit it; set {instead}."
            )
    for name, callback in callbacks.items():
        if isinstance(callback, EarlyStopping):
            raise ValueError(
                f"{stage}.fit.callbacks.{name} is {type(callback).__name__}, which stops training "
                "before its last step, up to which temperature and learning rate are scheduled. "
                f"Remove it, and set {key}.max_steps."
            )
    _check_off(key, given)
    bars = [name for name, callback in callbacks.items() if isinstance(callback, ProgressBar)]
    if bars and given.get("enable_progress_bar") is False:
        raise ValueError(
            f"{key}.enable_progress_bar is False, but {stage}.fit.callbacks.{bars[0]} is a "
            f"progress bar. Omit it, and set {stage}.fit.callbacks.{bars[0]}=null."
        )
    try:
        trainer = factory(callbacks=list(callbacks.values()), logger=False)
    except Exception as error:  # Lightning raises errors of many types
        wrong = [
            f"{key}.{name} is {value!r}"
            for name, value in given.items()
            if _is_refused(factory, {name: value})
        ]
        raise ValueError(f"{', '.join(wrong) or key}: {error}") from error
    _check_off(key, {
        "fast_dev_run": trainer.fast_dev_run, "overfit_batches": trainer.overfit_batches,
        "barebones": trainer.barebones, "enable_checkpointing": bool(trainer.checkpoint_callbacks),
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
            f"{key}.strategy is {given.get('strategy')!r}, which trains in processes launched by "
            f"{launcher._start_method}: the stage does not get their results. Give strategy=ddp or "
            "auto."
        )
    for timer in (each for each in trainer.callbacks if isinstance(each, Timer)):
        if (limit := timer.time_remaining()) is not None and limit <= 0:
            raise ValueError(f"{key}.max_time allows no step at all. Give a longer time, or null.")
    return trainer


def check_sharded(
    stage: str, trainer: Trainer, callbacks: Mapping[str, Callback], module: Denoising
) -> None:
    """Raise a ValueError for settings that sharded weights (``trainer=fsdp2``) do not support."""
    if not isinstance(trainer.strategy, ModelParallelStrategy):
        return
    # Lightning checks it only if the strategy is given as an object.
    if trainer.precision not in SHARDED_PRECISIONS:
        raise ValueError(
            f"{stage}.fit.trainer.precision is {trainer.precision!r}, which Lightning does not "
            f"support for sharded weights. Give one of {', '.join(SHARDED_PRECISIONS)}, or "
            "trainer=ddp."
        )
    module.check_sharded()
    for name, callback in callbacks.items():
        key = f"{stage}.fit.callbacks.{name}"
        if isinstance(callback, EvaluationCallback):
            raise ValueError(
                f"{key} samples during training, with numbers of batches that may differ between "
                "processes, but each call of a sharded block needs all of them. Set "
                f"{key}=null, or trainer=ddp."
            )
        if isinstance(callback, WeightAveraging) and not isinstance(callback, EMAWithWarmup):
            raise ValueError(
                f"{key} is {type(callback).__name__}, which copies the whole model in every "
                "process. Use tinyfusion_pl.callbacks.EMAWithWarmup, whose average is sharded like "
                "the weights; or trainer=ddp."
            )


def check_sampling_trainer(key: str, factory: Callable[..., Trainer]) -> Trainer:
    """Create and return the Trainer of a task without training.

    Raises:
        ValueError: for a setting that the Trainer rejects, or that would skip samples; names it.
    """
    given = getattr(factory, "keywords", {})
    try:
        trainer = factory()
    except Exception as error:  # Lightning raises errors of many types
        wrong = [
            f"{key}.{name} is {value!r}"
            for name, value in given.items()
            if _is_refused(factory, {name: value})
        ]
        raise ValueError(f"{', '.join(wrong) or key}: {error}") from error
    reasons = {
        "fast_dev_run": (False, "runs a single batch"),
        "limit_test_batches": (1.0, "skips samples"),
        "barebones": (False, "disables the results"),
        "overfit_batches": (0, "is for training"),
        "default_root_dir": (None, "the run folder determines"),
        "enable_checkpointing": (False, "has no effect here"),
    }
    for name, (allowed, reason) in reasons.items():
        if (value := given.get(name)) is not None and value != allowed:
            raise ValueError(f"{key}.{name} is {value!r}, which {reason}. Omit it.")
    if given.get("logger") not in (None, False):
        raise ValueError(
            f"{key}.logger is {given['logger']!r}, but metrics are saved to the run's own files. "
            "Leave it at false."
        )
    if isinstance(launcher := trainer.strategy.launcher, _MultiProcessingLauncher):
        raise ValueError(
            f"{key}.strategy is {given.get('strategy')!r}, whose processes are launched by "
            f"{launcher._start_method} and do not return their metrics. Give strategy=ddp or auto."
        )
    return trainer


def check_optimizer(stage: str, module: Denoising, *, num_steps: int) -> None:
    """Create the optimizer and the scheduler of `module` once.

    Raises:
        ValueError: for settings that they reject; names them.
    """
    parameters = [nn.Parameter(torch.zeros(1))]
    try:
        module.make_optimizers(parameters, num_steps=num_steps)
    except Exception as error:  # torch raises errors of several types
        factory = module.optimizer_factory
        key, given = f"{stage}.module.optimizer", getattr(factory, "keywords", {})
        wrong = [
            name
            for name, value in given.items()
            if _fails(getattr(factory, "func"), parameters, **{name: value})  # noqa: B009
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
    """Whether the Trainer rejects `setting` alone."""
    try:
        factory.func(**{"logger": False, "enable_checkpointing": False} | setting)
    except Exception:
        return True
    return False


def _check_off(key: str, given: Mapping[str, Any]) -> None:
    """Raise a ValueError for the first setting of `given` that no stage supports."""
    reasons = {
        "fast_dev_run": (
            False,
            "runs single batches and saves nothing. Set max_steps or +debug=default",
        ),
        "overfit_batches": (
            0,
            "replaces the resumable order of samples. Set max_steps for a short run",
        ),
        "barebones": (False, "disables checkpoints and logs"),
        "enable_checkpointing": (True, "leaves no checkpoint to resume from"),
    }
    for name, (allowed, reason) in reasons.items():
        if (value := given.get(name)) is not None and value != allowed:
            raise ValueError(f"{key}.{name} is {value!r}, which {reason}. Leave it at {allowed}.")


def check_length(stage: str, trainer: Trainer, *, num_steps: int, accumulate: int) -> None:
    """Raise a ValueError if epochs or limits keep `trainer` from `num_steps` steps."""
    key = f"{stage}.fit.trainer"
    # Lightning's defaults.
    endless = trainer.max_steps == -1 and trainer.max_epochs == 1000
    if trainer.max_epochs not in (None, -1) and not endless:
        raise ValueError(
            f"{key}.max_epochs is {trainer.max_epochs}, but the stage has {num_steps} steps. "
            "Leave max_epochs at -1."
        )
    limit = trainer.limit_train_batches
    num_batches = num_steps * accumulate  # of the one epoch that a fit is
    num_batches = limit if isinstance(limit, int) else int(num_batches * limit)
    if num_batches < 1:
        raise ValueError(
            f"{key}.limit_train_batches is {limit}, which leaves no batch. Leave it at 1.0."
        )
    if num_batches < num_steps * accumulate and num_batches % accumulate:
        raise ValueError(
            f"{key}.limit_train_batches is {limit}, so that every {num_batches} batches a step "
            f"would accumulate fewer than {accumulate} batches. Give a multiple of {accumulate}, "
            "or leave it at 1.0."
        )
