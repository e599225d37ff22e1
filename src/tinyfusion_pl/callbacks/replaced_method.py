"""Replaces methods of one LightningModule instance, such as the one that returns the loss."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor


def replace_method(
    pl_module: LightningModule, name: str, replacement: Callable[..., Any]
) -> Callable[[], Any]:
    """Set `replacement` as method `name` of `pl_module`; returns a function that undoes it."""
    own = pl_module.__dict__.get(name)
    setattr(pl_module, name, replacement)
    if own is None:
        return functools.partial(pl_module.__dict__.pop, name, None)
    return functools.partial(pl_module.__dict__.__setitem__, name, own)


def wrap_training_step(
    original: Callable[..., Any], *, start: Callable[[], None], loss: Callable[[Tensor], Tensor]
) -> Callable[..., Any]:
    """A ``training_step`` that calls `start` first and passes its loss through `loss`."""

    @functools.wraps(original)
    def training_step(*args: Any, **kwargs: Any) -> Any:
        start()
        result = original(*args, **kwargs)
        if isinstance(result, Tensor):
            return loss(result)
        if isinstance(result, dict) and isinstance(result.get("loss"), Tensor):
            return {**result, "loss": loss(result["loss"])}
        return result  # None skips the batch

    return training_step


def wrap_manual_backward(
    original: Callable[..., Any], *, loss: Callable[[Tensor], Tensor]
) -> Callable[..., Any]:
    """A ``manual_backward`` that passes the given loss through `loss`."""

    @functools.wraps(original)
    def manual_backward(given: Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(loss(given), *args, **kwargs)

    return manual_backward
