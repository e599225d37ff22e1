"""Shallow models of diffusers and transformers on disk: as their own libraries save and open them.

The library's own ``save_pretrained`` writes the folder, so that its plain ``from_pretrained`` opens it. Neither library is imported to
save; to load, a record's class is looked up in the library that it names, which must be one of `LIBRARIES`, and nothing else is called.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from tinyfusion_pl.artifacts import ArtifactError, atomic_path, temporary_path
from tinyfusion_pl.pruning.adapter_state import is_adapter_key
from tinyfusion_pl.pruning.library_configs import config_mismatch, is_library_model

LIBRARIES = ("diffusers", "transformers")
CONFIG_FILES = ("config.json", "generation_config.json")
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"


def not_savable(model: nn.Module) -> str | None:
    """Why a library cannot open `model` as it is, in a sentence; None when it can."""
    name = type(model).__name__
    if not is_library_model(model) or library_of(type(model)) is None:
        return f"{name} is no model of {' or '.join(LIBRARIES)}."
    if any(map(is_adapter_key, model.state_dict())):
        return f"{name} carries adapters of its own, which are not part of its config; merge them to save a plain model."
    if (reason := config_mismatch(model)) is not None:
        return f"{name} cannot state its depth: {reason}."
    return None


def library_of(cls: type) -> str | None:
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
    return {"library": library_of(type(model)), "class": type(model).__name__}


def _same_file(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def remove_library_files(folder: Path) -> None:
    """Take away what an earlier model left for its library, which does not describe what `folder` gets now."""
    for name in (*CONFIG_FILES, DIFFUSERS_WEIGHTS):
        (folder / name).unlink(missing_ok=True)


def load_library_model(folder: Path, entry: Mapping[str, Any]) -> nn.Module:
    """The model that `save_library_model` wrote, by the plain ``from_pretrained`` of the class in a record's `entry`.

    Raises:
        ArtifactError: for a library that is not one of `LIBRARIES`, or a class that it does not have.
        ValueError: when the library is not installed.
    """
    library, name = entry.get("library"), entry.get("class")
    if library not in LIBRARIES:
        raise ArtifactError(
            f"The record in {folder} names the library {library!r}; {' and '.join(LIBRARIES)} are known."
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
        and library_of(cls) == library
        and hasattr(cls, "from_pretrained")
    ):
        raise ArtifactError(
            f"The record in {folder} names the class {name!r}, which {library} {module.__version__} does not have. "
            "Install the version that the record states."
        )
    return cls.from_pretrained(folder, local_files_only=True, use_safetensors=True)
