"""One interface to the models of diffusers and transformers, which are built from a config that they carry.

Nothing here imports a library: their models are known by their methods. Models are built on the
meta device (no memory, no weights).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tinyfusion_pl.pruning.adapter_state import is_adapter_key
from tinyfusion_pl.pruning.blocks import get_module, split_path
from tinyfusion_pl.pruning.config_values import leaves, replaced

Shapes = dict[str, tuple[int, ...]]


def is_library_model(module: nn.Module) -> bool:
    """Whether `module` is built from a config that it carries: a model of diffusers or transformers."""
    return _is_diffusers(module) or _is_transformers(module)


def _is_diffusers(module: nn.Module) -> bool:
    return hasattr(module, "register_to_config") and hasattr(module, "_internal_dict")


def _is_transformers(module: nn.Module) -> bool:
    return hasattr(getattr(module, "config", None), "to_dict") and hasattr(
        type(module), "_from_config"
    )


def get_settings(module: nn.Module) -> dict[tuple, Any]:
    """Every setting of the config of `module` by its path in it."""
    return dict(leaves(dict(module.config) if _is_diffusers(module) else module.config))


def build_from(
    module: nn.Module, changes: Mapping[tuple, Any], *, from_file: bool = True
) -> nn.Module:
    """A model of the class of `module` on the meta device, its config with `changes`.

    A config of transformers is taken as it comes back from a file, where some are held to more than
    when they are changed; not so with `from_file` False.
    """
    with _quietly(), torch.device("meta"):
        if _is_diffusers(module):
            config = dict(module.config)
            return type(module).from_config(replaced(config, changes))
        config = _changed(copy.deepcopy(module.config), changes)
        return type(module)(type(config).from_dict(config.to_dict()) if from_file else config)


def write_settings(module: nn.Module, changes: Mapping[tuple, Any]) -> None:
    """Put `changes` into the config of `module`, in place."""
    if _is_diffusers(module):
        config = replaced(dict(module.config), changes)
        module.register_to_config(**{path[0]: config[path[0]] for path in changes})
    else:
        _changed(module.config, changes)


def _changed(config: Any, changes: Mapping[tuple, Any]) -> Any:
    """A config of transformers with `changes`, in place.

    Backbones name each layer's output as a stage and say which stages they give; one that gives the
    last layer's still does.
    """
    depth = getattr(config, "num_hidden_layers", None)
    stages = getattr(config, "stage_names", None)
    gives_last = stages is not None and list(config.out_indices or ()) == [depth]
    replaced(config, changes)
    if stages is not None and len(stages) == depth + 1 and config.num_hidden_layers != depth:
        config.stage_names = stages[: config.num_hidden_layers + 1]
        if gives_last:
            config.set_output_features_output_indices(
                out_features=None, out_indices=[config.num_hidden_layers]
            )
    return config


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the libraries' remarks on settings that a try leaves unused, and without moving the random state."""
    state, level = torch.get_rng_state(), logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)
        torch.set_rng_state(state)


def library_root(model: nn.Module, path: str) -> str | None:
    """Path of the outermost library model on the way to the stack at `path`; None where there is none."""
    parts = split_path(path)[0].split(".")
    for i in range(len(parts) + 1):
        owner = ".".join(parts[:i])
        if is_library_model(get_module(model, owner)):
            return owner
        if owner == split_path(path)[0]:
            break
    return None


def plain_shapes(model: nn.Module) -> Shapes:
    """Shape by key of the state dict, without compiling wrappers and adapters."""
    return {
        key.replace("_orig_mod.", "").replace(".base_layer.", "."): tuple(value.shape)
        for key, value in model.state_dict().items()
        if isinstance(value, torch.Tensor) and not is_adapter_key(key)
    }


def rebuilt(model: nn.Module) -> tuple[nn.Module | None, str | None]:
    """The model that the config of `model` describes, and why it is another one."""
    try:
        built = build_from(model, {})
    except Exception as error:  # whatever a library's constructor raises
        return (
            None,
            f"{type(model).__name__} cannot be built from its config on the meta device ({error})",
        )
    return built, difference(plain_shapes(built), plain_shapes(model))


def difference(built: Shapes, wanted: Shapes) -> str | None:
    if keys := sorted(built.keys() ^ wanted.keys()):
        where = "only the model has" if keys[0] in wanted else "only its config gives"
        return f"{where} {keys[0]}"
    for key, shape in wanted.items():
        if built[key] != shape:
            return f"{key} is {shape} in the model and {built[key]} by its config"
    return None
