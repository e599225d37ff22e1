"""Folders of diffusers that hold a model of one of our families."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from tinyfusion_pl.artifacts import ArtifactError, read_json
from tinyfusion_pl.models.family import DiffusersLayout, Family
from tinyfusion_pl.models.registry import list_families
from tinyfusion_pl.models.weight_files import read_folder_weights

CONFIG = "config.json"


class DiffusersModel(NamedTuple):
    """A model read from a folder of diffusers, in our layout."""

    family: Family
    name: str  # registered
    state: dict[str, Tensor]
    arguments: dict[str, Any]
    file: Path


def is_diffusers_folder(folder: str | Path) -> bool:
    """Whether `folder` is a pipeline with a transformer, or a single model."""
    return (Path(folder) / "transformer" / CONFIG).is_file() or (Path(folder) / CONFIG).is_file()


def read_diffusers_folder(folder: str | Path, *, variant: str | None = None) -> DiffusersModel:
    """Read a transformer from its folder or from that of its pipeline.

    Args:
        folder: See `is_diffusers_folder`.
        variant: See `read_folder_weights`.

    Raises:
        ArtifactError: A file is missing or broken, or the folder holds another model.
        ValueError: None of our families can represent the model.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        folder = folder / "transformer"
    config = read_json(folder / CONFIG)
    family, layout = _find_layout(config, folder / CONFIG)
    arguments = layout.read_arguments(config, folder)
    state, file = read_folder_weights(folder, variant=variant)
    if not state.keys() >= set(layout.signs):
        raise ArtifactError(
            f"{file} does not hold a {family.name} in diffusers' layout; it has "
            f"{', '.join(list(state)[:5])}."
        )
    converted = layout.convert(state, arguments, file)
    return DiffusersModel(family, layout.get_name(arguments), converted, arguments, file)


def _find_layout(config: Any, file: Path) -> tuple[Family, DiffusersLayout]:
    if not isinstance(config, Mapping):
        raise ArtifactError(
            f"{file} holds {type(config).__name__}; expected a mapping. Copy the folder again."
        )
    layouts = [(each, each.diffusers) for each in list_families() if each.diffusers is not None]
    name = config.get("_class_name")
    for family, layout in layouts:
        if isinstance(name, str) and name in layout.classes:
            return family, layout
    raise ArtifactError(
        f"{file} describes a {name!r:.80}; expected "
        f"{' or '.join(repr(layout.classes[0]) for _, layout in layouts)}. Give the folder of a "
        f"{' or '.join(family.name for family, _ in layouts)}."
    )
