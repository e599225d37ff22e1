"""Attributes of the Trainer that Lightning's connectors set, which type checkers cannot see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, Trainer


def get_callbacks(trainer: Trainer) -> Sequence[Callback]:
    """The Trainer's callbacks, in the order in which their hooks run."""
    return trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning's CallbackConnector


def get_datamodule(trainer: Trainer) -> Any:
    """The data module of the current run; None without one."""
    return trainer.datamodule  # type: ignore[attr-defined]  # set by Lightning's DataConnector


def get_log_every_n_steps(trainer: Trainer) -> int:
    """The Trainer's logging interval in steps; 0 disables logging."""
    return trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by its LoggerConnector
