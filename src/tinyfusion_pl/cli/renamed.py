"""Settings that were renamed: the old names still work for one release, with a warning."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

KEYS = {  # old key -> new key
    "data.pictures": "data.images",
    "reference.pictures": "reference.images",
}
TARGETS = {  # old _target_ -> new _target_
    "tinyfusion_pl.tasks.PictureFiles": "tinyfusion_pl.tasks.ImageFiles",
}


def rename_overrides(arguments: Sequence[str]) -> list[str]:
    """`arguments` of the command line with renamed keys and targets replaced by the new ones."""
    return [_renamed_override(argument) for argument in arguments]


def _renamed_override(argument: str) -> str:
    matched = re.fullmatch(r"(~|\+{0,2})([^=]*)(.*)", argument, re.DOTALL)
    assert matched is not None  # each part may be empty
    prefix, key, rest = matched.groups()
    if new := KEYS.get(key):
        _warn(key, new)
        key = new
    name, equal, value = rest.rpartition("=")
    if key.endswith("_target_") and (new := TARGETS.get(value)):
        _warn(value, new)
        rest = f"{name}{equal}{new}"
    return f"{prefix}{key}{rest}"


def rename_settings(cfg: DictConfig) -> None:
    """Move renamed settings of `cfg`, for example from a file of ``--config-dir``, in place."""
    for old, new in KEYS.items():
        parent, _, name = old.rpartition(".")
        node = OmegaConf.select(cfg, parent)
        if not isinstance(node, DictConfig) or name not in node:
            continue
        _warn(old, new)
        with open_dict(node):
            node[new.rpartition(".")[2]] = node._get_node(name)
            del node[name]
    _rename_targets(cfg)


def _rename_targets(node: DictConfig | ListConfig) -> None:
    container: Any = OmegaConf.to_container(node, resolve=False)
    for key, value in container.items() if isinstance(container, dict) else enumerate(container):
        if isinstance(value, (dict, list)) and OmegaConf.is_config(child := node[key]):
            _rename_targets(child)
        elif key == "_target_" and isinstance(value, str) and value in TARGETS:
            _warn(value, TARGETS[value])
            node[key] = TARGETS[value]


def _warn(old: str, new: str) -> None:
    warnings.warn(
        f"{old} was renamed to {new}. The old name will be removed in the next release.",
        FutureWarning,
        stacklevel=3,
    )
