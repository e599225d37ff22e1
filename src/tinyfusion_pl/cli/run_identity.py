"""What a run is: the part of its configuration that decides its numbers, the hash of it, and the run folder that belongs to it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tinyfusion_pl.cli.processes import is_first_process

# Where a run writes and which of its stages run: no part of what is computed, so no part of the folder's name.
NOT_IDENTITY = ("hydra", "run_dir", "paths", "task")
SEAL = "# sha256: "  # last line of config.yaml: of all lines before it, the last of which states the configuration's hash


def identity(cfg: DictConfig) -> dict[str, Any]:
    """What decides a run's numbers, as plain data: everything but `NOT_IDENTITY`.

    A reference to a single value becomes that value; one to a whole group, or to where the run is, stays as written.
    """
    raw = OmegaConf.to_container(cfg, resolve=False)
    kept = OmegaConf.create({key: value for key, value in raw.items() if key not in NOT_IDENTITY})
    _settle(kept)
    return OmegaConf.to_container(kept, resolve=False)


def config_hash(cfg: DictConfig) -> str:
    """8 hexadecimal digits of the SHA-256 over the `identity` of `cfg`."""
    return hashlib.sha256(_canonical(identity(cfg)).encode()).hexdigest()[:8]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _settle(node: DictConfig | ListConfig) -> None:
    for key, written in items(OmegaConf.to_container(node, resolve=False)):
        if OmegaConf.is_interpolation(node, key):
            with suppress(OmegaConfBaseException):  # it refers to what was taken out
                if "${hydra:" not in written and not OmegaConf.is_config(value := node[key]):
                    node[key] = value
        elif isinstance(written, (dict, list)):
            _settle(node[key])


def items(container: dict | list) -> Iterator[tuple[Any, Any]]:
    yield from container.items() if isinstance(container, dict) else enumerate(container)


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _flat(container: dict | list, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in items(container):
        if isinstance(value, (dict, list)) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _canonical(value)


def check_folder(run_dir: Path, cfg: DictConfig) -> None:
    file = run_dir / "config.yaml"
    if not file.exists():
        return
    try:
        there, here = (dict(_flat(identity(config))) for config in (OmegaConf.load(file), cfg))
    except Exception as error:
        raise ValueError(f"{file} is not a readable configuration ({error}). Give another run_dir.") from error
    differing = [key for key in {**here, **there} if here.get(key) != there.get(key)]
    if differing:
        shown = "; ".join(f"{key} is {there.get(key, 'not set')} there and {here.get(key, 'not set')} here"
                          for key in differing[:3])  # fmt: skip
        more = f"; {len(differing) - 3} more differ" if len(differing) > 3 else ""
        raise ValueError(
            f"{run_dir} holds a run of another configuration ({shown}{more}). Give another run_dir=PATH, or none: each "
            "configuration then gets its own folder."
        )


def write_config(run_dir: Path, cfg: DictConfig) -> None:
    from tinyfusion_pl.artifacts import write_text  # imports torch, which --help does not need

    if (run_dir / "config.yaml").exists() or not is_first_process():
        return
    raw, where = OmegaConf.to_container(cfg, resolve=False), {}
    for key in ("run_dir", "paths"):
        if key in cfg:
            where[key] = OmegaConf.to_container(cfg[key], resolve=True) if OmegaConf.is_config(cfg[key]) else cfg[key]
    whole = {**identity(cfg), "task": raw["task"], **where}
    text = f"{OmegaConf.to_yaml(OmegaConf.create(whole))}# configuration: {config_hash(cfg)}\n"
    write_text(run_dir / "config.yaml", f"{text}{SEAL}{_sha256(text.encode())}\n")
