"""Checks of ``-m``: values of a sweep without it, or ``-m`` without any, are errors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig

from tinyfusion_pl.cli.paths import absolute_path

# Environment variables: `wandb agent` sets the first for each arm of its sweep; the second is the
# folder of the sweep, for the processes that one of its runs starts.
WANDB_SWEEP = "WANDB_SWEEP_ID"
SWEEP = "TINYFUSION_SWEEP"


def check_sweep(arguments: Sequence[str]) -> None:
    """Raise a ValueError for ``-m`` with one value per setting: that is a single run."""
    options = get_args_parser().parse_args(list(arguments))
    if not options.multirun or options.config_dir or options.config_name or not options.overrides:
        return
    parsed = OverridesParser.create().parse_overrides(options.overrides)
    names = ("sweep", "experiment")
    if not any(
        p.is_sweep_override() or p.key_or_group in names or "hydra." in p.key_or_group
        for p in parsed
    ):
        raise ValueError(
            f"-m runs a sweep, but each setting has one value ({' '.join(options.overrides)}). "
            "Separate several values by commas, for example seed=0,1, or add +sweep=NAME; for a "
            "single run, omit -m."
        )


def check_single(sweeper: DictConfig) -> None:
    """Raise a ValueError for sweep parameters without ``-m``, which Hydra would ignore."""
    if params := sweeper.get("params"):
        raise ValueError(
            "the configuration defines a sweep "
            f"({', '.join(f'{key}={value}' for key, value in params.items())}), but without -m a "
            "single run would ignore its values. Add -m."
        )


def is_arm(job: HydraConf) -> bool:
    """Whether `job` is an arm of a sweep, Hydra's or W&B's."""
    return job.mode == RunMode.MULTIRUN or WANDB_SWEEP in os.environ


def in_sweep(name: str) -> str | None:
    """Path of `name` in the folder of the current sweep; None outside a sweep."""
    if HydraConfig.initialized() and is_arm(job := HydraConfig.get()):
        return str(Path(absolute_path(job.sweep.dir), name))
    sweep = os.environ.get(SWEEP)
    return None if sweep is None else str(Path(sweep, name))
