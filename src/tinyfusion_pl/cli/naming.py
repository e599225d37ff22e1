"""The key of the setting that an error is about: classes name only their arguments."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tinyfusion_pl.cli.errors import sentence
from tinyfusion_pl.cli.references import home
from tinyfusion_pl.cli.run_identity import items

# The key of a setting inside an object.
KEY = re.compile(r"(?<![\w./'\"-])[a-z]\w*(?:\.[a-z]\w*){2,}(?![\w/])")


def named(error: Exception, cfg: DictConfig) -> str | None:
    """`sentence` of an error in instantiating a part of `cfg`, with the key of the setting."""
    message = sentence(error)
    if message is None:
        return None
    # A Trainer's devices are set at runtime.devices.
    message = KEY.sub(lambda found: home(cfg, found[0]), message)
    place = re.search(r"full_key: (\S+)", str(error))
    key = home(cfg, place[1]) if place else "task"
    leaves = dict(_leaves(cfg, key, set()))
    inner = {
        ".".join(parts[:size])
        for full in leaves
        for parts in [full.split(".")]
        for size in range(2, len(parts) + 1)
    }
    if any(re.search(rf"(?<![\w.]){re.escape(each)}(?!\w)", message) for each in inner):
        return message
    full = _about(message, leaves)
    if full is None:
        return message if key == "task" or key in message else f"{key}: {message}"
    name = full.rpartition(".")[2]
    if re.match(rf"{re.escape(name)}\b", message):
        return f"{full}{message[len(name) :]}"
    return f"{full}: {message}"


def _about(message: str, leaves: dict[str, Any]) -> str | None:
    """The key whose name and value `message` states, or the only one whose name it states."""
    names = {
        full: re.escape(next(part for part in reversed(full.split(".")) if not part.isdigit()))
        for full in leaves
    }
    for between in (r"\W*(?:is |=|: )?\W*", r"\b.*?(?<![\w.])"):
        for full, value in leaves.items():
            texts = {re.escape(str(value)), re.escape(repr(value))} - {""}
            if re.search(
                rf"(?<![\w.])(?i:{names[full]}){between}(?:{'|'.join(texts)})(?!\w)",
                message,
                re.DOTALL,
            ):
                return full
    mentioned = [full for full in leaves if re.search(rf"(?<![\w.]){names[full]}\b", message)]
    quoted = [
        full
        for full, value in leaves.items()
        if isinstance(value, str)
        and value.strip("./")
        and re.search(rf"(?<![\w./-]){re.escape(value)}(?![\w/-])", message)
    ]
    return next((one for found in (mentioned, quoted) if (one := _only(found))), None)


def _only(found: list[str]) -> str | None:
    """The one key in `found`; items of one list count as that list."""
    keys = {re.sub(r"(\.\d+)+$", "", full) for full in found} if len(found) > 1 else set(found)
    return keys.pop() if len(keys) == 1 else None


def _leaves(cfg: DictConfig, key: str, seen: set[str]) -> Iterator[tuple[str, Any]]:
    """(key, value) of every setting under `key`, with the key where it is set."""
    key = home(cfg, key)
    if key in seen:
        return
    seen.add(key)
    try:
        value = OmegaConf.select(cfg, key)
    except OmegaConfBaseException:
        return
    if isinstance(value, (DictConfig, ListConfig)) and len(value):
        for name, _ in items(OmegaConf.to_container(value, resolve=False)):
            yield from _leaves(cfg, f"{key}.{name}", seen)
    elif not key.rpartition(".")[2].startswith("_"):
        yield key, OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
