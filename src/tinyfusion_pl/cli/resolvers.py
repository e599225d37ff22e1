"""The OmegaConf resolvers of the configurations."""

from __future__ import annotations

from collections.abc import Iterable

from omegaconf import OmegaConf

from tinyfusion_pl.cli.paths import absolute_path, expand_user
from tinyfusion_pl.cli.run_identity import compute_hash, config_hash
from tinyfusion_pl.cli.sweeps import in_sweep


def register(commands: Iterable[str]) -> None:
    """Register the resolvers; `commands` are those that ``--help`` lists."""
    listed = ", ".join(commands)
    resolvers = {
        "config_hash": lambda *, _root_: config_hash(_root_),
        "compute_hash": lambda *names, _root_: compute_hash(_root_, *names),
        "in_sweep": in_sweep,
        "absolute_path": lambda path: absolute_path(expand_user(str(path))),
        "expand_user": lambda path: expand_user(str(path)),
        "commands": lambda: listed,
    }
    for name, resolver in resolvers.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)
