"""A run's identity: the configuration that determines its results, its hash and its folder."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tinyfusion_pl.cli.processes import is_first_process

# Where a run writes and which stages run do not affect results, so they are not in the folder's
# name.
NOT_IDENTITY = ("hydra", "run_dir", "paths", "task")
RESOLVER = re.compile(r"\$\{([\w.]+):")
# Resolvers whose value depends on the configuration alone, or that stay as written.
PURE_RESOLVERS = {"oc.select", "hydra"}
SHARED = "tinyfusion_pl.tasks.SharedResults"  # sharing results between runs does not change them
CONFIG, LOCK = "config.yaml", ".lock"
PUT_BACK = (
    "Restore the original file; or delete it, and it is rewritten from this command's "
    "configuration, unless the folder belongs to another one."
)
# The last line of config.yaml: SHA-256 of all lines before it, which end with the configuration's
# hash.
SEAL = "# sha256: "


def identity(cfg: DictConfig) -> dict[str, Any]:
    """The configuration that determines a run's results, as plain data.

    Everything but `NOT_IDENTITY` and `SHARED`. A reference to a single value becomes that value;
    one to a whole group, or to the run's location, stays as written.
    """
    raw = _without_shared(OmegaConf.to_container(cfg, resolve=False))
    written = json.dumps(
        {key: value for key, value in raw.items() if key not in NOT_IDENTITY}, default=str
    )
    if set(RESOLVER.findall(written)) <= PURE_RESOLVERS:
        return json.loads(_settled(written))
    return _settled_now({key: value for key, value in raw.items() if key not in NOT_IDENTITY})


@lru_cache(maxsize=16)  # a command calls this several times, at a tenth of a second each
def _settled(written: str) -> str:
    return json.dumps(_settled_now(json.loads(written)), default=str)


def _settled_now(raw: dict[str, Any]) -> dict[str, Any]:
    kept = OmegaConf.create(raw)
    _settle(kept)
    container: Any = OmegaConf.to_container(kept, resolve=False)
    return container


def config_hash(cfg: DictConfig) -> str:
    """8 hexadecimal digits of the SHA-256 over the `identity` of `cfg`."""
    return hashlib.sha256(_canonical(identity(cfg)).encode()).hexdigest()[:8]


def compute_hash(cfg: DictConfig, *names: str) -> str:
    """`config_hash` of the parts `names` of the configuration alone."""
    parts = identity(cfg)
    canonical = _canonical({name: parts[name] for name in names})
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]


def _without_shared(node: Any) -> Any:
    if isinstance(node, dict):
        kept = {
            key: value
            for key, value in node.items()
            if not (isinstance(value, dict) and value.get("_target_") == SHARED)
        }
        return {key: _without_shared(value) for key, value in kept.items()}
    return [_without_shared(value) for value in node] if isinstance(node, list) else node


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _settle(node: DictConfig | ListConfig) -> None:
    for key, written in items(OmegaConf.to_container(node, resolve=False)):
        if OmegaConf.is_interpolation(node, key):
            with suppress(OmegaConfBaseException):  # refers to a part that is not in the identity
                if "${hydra:" not in written and not OmegaConf.is_config(value := node[key]):
                    node[key] = value
        elif isinstance(written, (dict, list)):
            _settle(node[key])


def items(container: Any) -> Iterator[tuple[Any, Any]]:
    """(key, value) of each item of a dict or list."""
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
    """Check that `run_dir` belongs to the configuration `cfg`, or to none.

    Raises:
        ValueError: if it belongs to another configuration, or to an unknown one; states the
            differences.
    """
    file, here = run_dir / CONFIG, config_hash(cfg)
    if file.exists():
        _check_config(file, cfg)
    finished = {mark: _get_configuration(mark) for mark in sorted(run_dir.glob("stages/*.json"))}
    for mark, there in finished.items():
        if there not in (None, here):
            raise ValueError(
                f"{mark} belongs to another configuration (hash {there}; the hash of this one is "
                f"{here}). Give another run_dir=PATH, or omit it: each configuration gets its own "
                "folder."
            )
    if file.exists() or here in finished.values():
        return
    if finished:  # by an earlier version, or from Python
        raise ValueError(
            f"{run_dir} contains {min(finished).relative_to(run_dir)}, but no {CONFIG}, so its "
            f"configuration is unknown. Restore {CONFIG}, or give another run_dir=PATH."
        )


def _check_config(file: Path, cfg: DictConfig) -> None:
    run_dir = file.parent
    if not (file.is_file() or file.is_dir()):
        raise ValueError(f"{file} is not a regular file. Remove it, or give another run_dir.")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ValueError(
            f"Could not read {file}: {error.strerror}. Give another run_dir."
        ) from error
    if SEAL.encode() in content and not _is_sealed(content):
        raise ValueError(
            f"{file} does not match its own hash: it was changed or damaged after the run wrote "
            f"it. {PUT_BACK}"
        )
    try:
        there, here = (dict(_flat(identity(config))) for config in (_parse(content.decode()), cfg))
    except Exception as error:
        if SEAL.encode() not in content:
            raise ValueError(
                f"{file} is not a valid configuration ({error}), and does not end with its own "
                f"hash: it is truncated, or from an earlier version. {PUT_BACK}"
            ) from error
        raise ValueError(f"{file} is not a valid configuration ({error}). {PUT_BACK}") from error
    differing = [key for key in {**here, **there} if here.get(key) != there.get(key)]
    if any(key not in there for key in differing) and SEAL.encode() not in content:
        raise ValueError(
            f"{file} does not end with its own hash, and lacks "
            f"{sum(key not in there for key in differing)} settings: it is truncated, or from an "
            f"earlier version. {PUT_BACK}"
        )
    if differing:
        shown = "; ".join(
            f"{key} is {there.get(key, 'not set')} there and {here.get(key, 'not set')} here"
            for key in differing[:3]
        )
        more = f"; {len(differing) - 3} more differ" if len(differing) > 3 else ""
        alone = (
            f" The folder contains only {file}: delete it to use this folder."
            if _is_alone(file)
            else ""
        )
        raise ValueError(
            f"{run_dir} belongs to a run of another configuration ({shown}{more}). Give another "
            f"run_dir=PATH, or omit it: each configuration gets its own folder.{alone}"
        )


def _parse(text: str) -> DictConfig:
    cfg = OmegaConf.create(text)
    if not isinstance(cfg, DictConfig):
        raise TypeError("expected a mapping")
    return cfg


def _is_sealed(content: bytes) -> bool:
    """Whether the content of a ``config.yaml`` ends with the hash of everything before it."""
    written, _, stated = content.rpartition(SEAL.encode())
    return stated == f"{_sha256(written)}\n".encode()


def _get_configuration(mark: Path) -> str | None:
    """The configuration's hash in the file of a finished stage, written by `RunFolder.finish`."""
    # Imports torch, which --help does not need.
    from tinyfusion_pl.checksums import Damaged, read_sealed

    try:
        return read_sealed(mark).get("configuration")
    except Damaged:
        return None  # reported by the stage that reads it


def _is_alone(file: Path) -> bool:
    return {each.name for each in file.parent.iterdir()} <= {CONFIG, LOCK}


def write_config(run_dir: Path, cfg: DictConfig) -> None:
    """Write `cfg` with its hash to ``config.yaml``, unless the file exists: then it is the same."""
    from tinyfusion_pl.artifacts import write_text  # imports torch, which --help does not need

    if (run_dir / CONFIG).exists() or not is_first_process():
        return
    raw: Any = OmegaConf.to_container(cfg, resolve=False)
    where = {}
    for key in ("run_dir", "paths"):
        if key in cfg:
            where[key] = (
                OmegaConf.to_container(cfg[key], resolve=True)
                if OmegaConf.is_config(cfg[key])
                else cfg[key]
            )
    whole = {**identity(cfg), "task": raw["task"], **where}
    text = f"{OmegaConf.to_yaml(OmegaConf.create(whole))}# configuration: {config_hash(cfg)}\n"
    write_text(run_dir / CONFIG, f"{text}{SEAL}{_sha256(text.encode())}\n")


def forget_config(run_dir: Path) -> None:
    """Remove ``config.yaml`` if no file in the folder is newer: the run wrote nothing else."""
    config = run_dir / CONFIG
    with suppress(OSError):
        written = config.stat().st_mtime_ns
        others = (each for each in run_dir.rglob("*") if each.name not in (CONFIG, LOCK))
        if is_first_process() and not any(each.lstat().st_mtime_ns >= written for each in others):
            config.unlink()
