"""What is checked of a configuration before anything is built from it."""

from __future__ import annotations

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf

from tinyfusion_pl.cli.run_identity import items


def check_added(cfg: DictConfig) -> None:
    """Refuse ``+experimnt=x``: Hydra adds it as a setting that nothing reads, and the default would run."""
    if not HydraConfig.initialized():
        return
    for override in HydraConfig.get().overrides.task:
        key = override.removeprefix("+").partition("=")[0]
        if override.startswith("+") and "." not in key and "@" not in key and key in cfg and not OmegaConf.is_config(cfg[key]):
            raise ValueError(f"There is no configuration group {key!r} to add ({override}). Groups to add are +experiment, +sweep and "
                             "+debug; --help lists the choices.")


def check_complete(node: DictConfig | ListConfig) -> None:
    """Read every value, also behind references, so that a missing one is found (Hydra leaves it out of a partial)."""
    for key, _ in items(OmegaConf.to_container(node, resolve=False)):
        if OmegaConf.is_config(value := node[key]):
            check_complete(value)
