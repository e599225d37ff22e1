"""``-m`` and what it goes with: values for a sweep without it, or it without any, would run something else than was meant."""

from __future__ import annotations

import os
from collections.abc import Sequence

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig

WANDB_SWEEP = "WANDB_SWEEP_ID"  # environment variable: set by `wandb agent` for an arm of its sweep
SWEEP = "TINYFUSION_SWEEP"  # environment variable: the sweep's folder, for the processes that one of its runs starts


def check_sweep(arguments: Sequence[str]) -> None:
    """Refuse ``-m`` where nothing has several values: it would be one run in a sweep's folder."""
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
            f"-m runs a sweep, but no setting has several values ({' '.join(options.overrides)}). Give values with commas, as "
            "seed=0,1, or +sweep=NAME; or leave out -m."
        )


def check_single(sweeper: DictConfig) -> None:
    """Refuse a sweep's values without ``-m``: none of them would be used."""
    if params := sweeper.get("params"):
        raise ValueError(
            f"the configuration gives several values ({', '.join(f'{key}={value}' for key, value in params.items())}), but "
            "without -m one run "
            "is made, with none of them. Add -m."
        )


def is_arm(job: DictConfig) -> bool:
    """Whether the run is an arm of a sweep: of Hydra's or of W&B's."""
    return job.mode == RunMode.MULTIRUN or WANDB_SWEEP in os.environ


def in_sweep(name: str) -> str | None:
    """Path of `name` in the folder of the sweep that this run is of; None where it is of none."""
    if HydraConfig.initialized() and is_arm(job := HydraConfig.get()):
        return os.path.join(os.path.abspath(job.sweep.dir), name)
    sweep = os.environ.get(SWEEP)
    return None if sweep is None else os.path.join(sweep, name)
