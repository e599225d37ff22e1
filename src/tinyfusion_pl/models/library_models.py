"""Shallow models of diffusers and transformers on disk: as their own libraries save and open them.

The library's own ``save_pretrained`` writes the folder, so that its plain ``from_pretrained`` opens
it. Neither library is imported to save; to load, a record's class is looked up in the library that
it names, which must be one of `LIBRARIES`, and nothing else is called.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion_pl.artifacts import ArtifactError, atomic_path, read_json, temporary_path
from tinyfusion_pl.models.fitting import check_values
from tinyfusion_pl.models.notices import first_line
from tinyfusion_pl.pruning.adapter_state import is_adapter_key
from tinyfusion_pl.pruning.config_values import leaves
from tinyfusion_pl.pruning.library_configs import config_mismatch
from tinyfusion_pl.pruning.library_interface import is_library_model
from tinyfusion_pl.pruning.run_maps import get_maps

LIBRARIES = ("diffusers", "transformers")
CONFIG_FILES = ("config.json", "generation_config.json")
# Settings with one of these words count modules, which take time and memory even without weights.
COUNTING = ("num_layers", "layers", "depth", "num_blocks", "n_layer", "num_single")
MIN_COUNT = 1000  # what such a name may also stand for
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"


def not_savable(model: nn.Module) -> str | None:
    """Why a library cannot open `model` as it is, in a sentence; None when it can."""
    name = type(model).__name__
    if not is_library_model(model) or get_library(type(model)) is None:
        return f"{name} is no model of {' or '.join(LIBRARIES)}."
    if any(map(is_adapter_key, model.state_dict())):
        return f"{name} carries adapters of its own, which are not part of its config; merge them to save a plain model."
    if get_maps(model):
        return f"{name} has linear maps in place of removed blocks, which its library does not know of."
    if (reason := config_mismatch(model)) is not None:
        return f"{name} cannot state its depth: {reason}."
    return None


def get_library(cls: type) -> str | None:
    """The library that `cls` is a public class of; a subclass of one's own is none of it."""
    library = cls.__module__.partition(".")[0]
    if library not in LIBRARIES:
        return None
    return library if getattr(importlib.import_module(library), cls.__name__, None) is cls else None


def save_library_model(folder: Path, model: nn.Module, weights: str) -> dict[str, str]:
    """Write `model` into `folder` as its library does, the weights under the name `weights` too (one file on disk, of two names).

    Returns:
        The entry ``library`` of a record: the library and the class.
    """
    temporary = temporary_path(folder / "library")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(temporary, max_shard_size="1000TB", safe_serialization=True)
        written = {file.name for file in temporary.iterdir()}
        own = DIFFUSERS_WEIGHTS if DIFFUSERS_WEIGHTS in written else weights
        if own not in written:
            raise ArtifactError(
                f"{type(model).__name__}.save_pretrained wrote {sorted(written)}, where {own} was expected."
            )
        for name in sorted(written, key=lambda name: name in CONFIG_FILES):  # weights first
            os.replace(temporary / name, folder / name)
        if own != weights:
            with atomic_path(folder / weights) as target:
                _same_file(folder / own, target)
    except OSError as error:
        raise ArtifactError(
            f"Cannot write {folder}: {error}. Free some space or choose another folder."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return {"library": get_library(type(model)), "class": type(model).__name__}


def _same_file(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def remove_library_files(folder: Path) -> None:
    """Take away what an earlier model left for its library, which does not describe what `folder` gets now."""
    for name in (*CONFIG_FILES, DIFFUSERS_WEIGHTS):
        (folder / name).unlink(missing_ok=True)


def load_library_model(
    folder: Path, entry: Mapping[str, Any], state: Mapping[str, Tensor]
) -> nn.Module:
    """The model that `save_library_model` wrote, by the plain ``from_pretrained`` of the class in a record's `entry`.

    Args:
        folder: Where it is.
        entry: The library and the class.
        state: Its weights: the config must be that of a model which has them, all of them and no
            more.

    Raises:
        ArtifactError: for a library that is not one of `LIBRARIES`, a class that it does not have,
            or a config that is broken or of another model.
        ValueError: when the library is not installed.
    """
    library, name = entry.get("library"), entry.get("class")
    if library not in LIBRARIES:
        raise ArtifactError(
            f"The record in {folder} names the library {library!r:.80}; {' and '.join(LIBRARIES)} are known."
        )
    try:
        module = importlib.import_module(library)
    except ImportError as error:
        raise ValueError(
            f"The model in {folder} is {name} of {library}, which is not installed: pip install {library}."
        ) from error
    cls = getattr(module, name, None) if isinstance(name, str) else None
    if not (
        isinstance(cls, type)
        and issubclass(cls, nn.Module)
        and get_library(cls) == library
        and hasattr(cls, "from_pretrained")
    ):
        raise ArtifactError(
            f"The record in {folder} names the class {name!r:.80}, which {library} {module.__version__} does not have. "
            "Install the version that the record states."
        )
    check_values(state, folder)
    _check_config(cls, folder, state)
    try:
        model, info = cls.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # of many kinds: config, safetensors, shapes
        raise ArtifactError(
            f"{folder} cannot be loaded by {library} as {name} ({type(error).__name__}: {first_line(error)}). Copy the "
            "folder again."
        ) from error
    if wrong := [
        *info["missing_keys"],
        *info["mismatched_keys"],
    ]:  # which the library leaves at random values
        raise ArtifactError(
            f"The weights in {folder} lack {len(wrong)} of those that its {CONFIG_FILES[0]} asks for, "
            f"{', '.join(map(str, wrong[:3]))} among them. Copy the folder again."
        )
    if extra := info["unexpected_keys"]:  # which the library leaves out
        raise ArtifactError(
            f"The weights in {folder} hold {len(extra)} tensors that a model of its {CONFIG_FILES[0]} has not, "
            f"{', '.join(map(str, list(extra)[:3]))} among them. Copy the folder again."
        )
    return model


def _check_config(cls: type[nn.Module], folder: Path, state: Mapping[str, Tensor]) -> None:
    """Hold the config against the weights before a model takes memory: by its counts, then on the meta device."""
    file = folder / CONFIG_FILES[0]
    config = read_json(file)
    if not isinstance(config, dict):
        raise ArtifactError(
            f"{file} holds {type(config).__name__}, where a mapping was expected. Copy the folder again."
        )
    for path, value in leaves(config):
        if any(word in str(path[-1]) for word in COUNTING) and _largest(value) > max(
            len(state), MIN_COUNT
        ):
            raise ArtifactError(
                f"{file}: {'.'.join(map(str, path))!r} is {value!r:.80}, and the weights beside it are "
                f"{len(state)} tensors. "
                "Copy the folder again."
            )
    try:
        with torch.device("meta"):
            if hasattr(cls, "from_config"):
                outline = cls.from_config(config)
            else:
                outline = cls(cls.config_class.from_pretrained(folder, local_files_only=True))
    except NotImplementedError:
        return
    except Exception as error:  # what a wrong setting ends in is up to the library
        if "meta" in str(error):
            return
        raise ArtifactError(
            f"{file} describes no {cls.__name__} ({type(error).__name__}: {first_line(error)}). Copy the "
            "folder again."
        ) from error
    own = outline.state_dict()
    if wrong := [
        key for key, value in state.items() if key in own and own[key].shape != value.shape
    ]:
        raise ArtifactError(
            f"{file} describes another model than the weights beside it are of: {wrong[0]} would be "
            f"{tuple(own[wrong[0]].shape)} and is {tuple(state[wrong[0]].shape)}. Copy the folder again."
        )


def _largest(value: Any) -> float:
    numbers = value if isinstance(value, (list, tuple)) else [value]
    return max((number for number in numbers if type(number) in (int, float)), default=0)
