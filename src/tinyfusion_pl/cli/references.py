"""Values of a configuration as written and as read: a reference leads to another key."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, ListConfig, Node, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tinyfusion_pl.cli.run_identity import items

REFERENCE = re.compile(r"\$\{([^{}]*)\}")  # matches the whole value
TARGET = "_target_"


class Unresolved:
    """A value behind a reference that cannot be resolved."""


def home(cfg: DictConfig, key: str) -> str:
    """The key where the value of `key` is set.

    Follows references: ``data.seed`` -> ``seed``, ``task.evaluate.labels`` -> ``evaluate.labels``.
    """
    for _ in range(20):
        node: Any = cfg
        parts = key.split(".")
        for place, part in enumerate(parts):
            index = int(part) if isinstance(node, ListConfig) else part
            try:
                if OmegaConf.is_interpolation(node, index):
                    inner = REFERENCE.fullmatch(written(node, index))
                    if (
                        inner is None
                        or not inner[1].replace(".", "").isidentifier()
                        or inner[1].startswith(".")
                    ):
                        return key
                    key = ".".join([inner[1], *parts[place + 1 :]])
                    break
                node = raw(node, index)
            except (OmegaConfBaseException, TypeError, IndexError, ValueError):
                return key
        else:
            return key
    return key


def raw(node: DictConfig | ListConfig, name: Any) -> Any:
    """The child `name` of `node`; a reference as it is written."""
    if OmegaConf.is_missing(node, name):
        return "???"
    return written(node, name) if OmegaConf.is_interpolation(node, name) else node[name]


def written(node: DictConfig | ListConfig, name: Any) -> str:
    """A reference as it is written."""
    child = node._get_node(name)
    assert isinstance(child, Node)
    return str(child._value())


def get_names(node: DictConfig | ListConfig) -> list[Any]:
    """Keys or indices of all children, including missing values."""
    return list(range(len(node))) if isinstance(node, ListConfig) else list(node.keys())


def outline(value: Any) -> Any:
    """A value as plain data; objects in it are reduced to their ``_target_``."""
    if isinstance(value, DictConfig) and TARGET in value:
        return {TARGET: _read(value, TARGET)}
    if isinstance(value, DictConfig):
        return {name: outline(_read(value, name)) for name in value}
    if isinstance(value, ListConfig):
        return [outline(_read(value, index)) for index in range(len(value))]
    return value


def _read(node: DictConfig | ListConfig, name: Any) -> Any:
    try:
        return node[name]
    except Exception:  # from any resolver; reported at the key where it is set
        return raw(node, name)


def sharpen(node: DictConfig | ListConfig, name: Any, value: Any, found: Any) -> None:
    """Replace whole floats by the integers in `found`."""
    if isinstance(value, float) and isinstance(found, int):
        node[name] = found
    elif (
        isinstance(value, (dict, list)) and isinstance(found, (dict, list)) and TARGET not in value
    ):
        for each, inner in items(value):
            if not OmegaConf.is_interpolation(node[name], each) and each in dict(items(found)):
                sharpen(node[name], each, inner, found[each])


def words_referred_to(cfg: DictConfig) -> set[str]:
    """All names in the references of a configuration."""
    texts = _texts(OmegaConf.to_container(cfg, resolve=False))
    return {word for text in texts if "${" in text for word in re.findall(r"\w+", text)}


def _texts(container: Any) -> Iterator[str]:
    if isinstance(container, str):
        yield container
    elif isinstance(container, (dict, list)):
        for _, value in items(container):
            yield from _texts(value)
