"""Dense models of other libraries from a record's ``model_factory``: only known factories are called, never a name from a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from tinyfusion_pl.artifacts import ArtifactError
from tinyfusion_pl.models.fitting import fitting_state
from tinyfusion_pl.models.notices import first_line
from tinyfusion_pl.pruning import remove_blocks

# of a dense model; its record states no weights of the blocks that were dropped, so that no tensor
# bounds it
MAX_DEPTH = 1000
# Arguments of timm.create_model that would read other files, or the network.
FOREIGN = (
    "checkpoint_path",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "cache_dir",
    "pretrained_strict",
)


def from_factory(
    factory: Mapping[str, Any],
    kept_blocks: Mapping[str, Sequence[int]],
    state: Mapping[str, Tensor],
    record: Path,
    *,
    prepare: Callable[[nn.Module], nn.Module],
) -> nn.Module:
    """The cut of the dense model that ``{"name": "timm/<model>", "kwargs": {...}}`` states, randomly initialised.

    `prepare` gives the cut model what the record states besides (linear maps). It is cut without
    memory first, and held against `state`, the weights that it shall get.

    Raises:
        ValueError: for an unknown factory, or weights that do not fit.
        ArtifactError: for arguments that no model is built of.
    """
    name, kwargs = factory["name"], factory.get("kwargs") or {}
    if not name.startswith("timm/"):
        raise ValueError(
            f"{record}: model_factory {name!r:.80} is not known; 'timm/<name>' is. Use load_shallow(path, model=...) for "
            "other models."
        )
    if refused := [key for key in kwargs if key in FOREIGN]:
        raise ArtifactError(
            f"{record}: model_factory.kwargs.{refused[0]} is not read from a file. Use load_shallow(path, model=...)."
        )
    if deep := [
        key for key, value in kwargs.items() if "depth" in key and _largest(value) > MAX_DEPTH
    ]:
        raise ArtifactError(
            f"{record}: model_factory.kwargs.{deep[0]} is {kwargs[deep[0]]!r:.80}; up to {MAX_DEPTH} blocks are built."
        )

    def build() -> nn.Module:
        return prepare(
            remove_blocks(
                timm.create_model(name.removeprefix("timm/"), pretrained=False, **kwargs),
                kept_blocks,
            )
        )

    try:
        with torch.device("meta"):
            outline = build()
    except NotImplementedError:
        outline = None
    except Exception as error:  # what a wrong argument ends in is up to timm's models
        raise ArtifactError(
            f"{record}: 'model_factory' ({name:.80}, {dict(kwargs)!r:.120}) builds no model that has the blocks kept "
            f"({type(error).__name__}: {first_line(error)})."
        ) from error
    if outline is not None:
        fitting_state(outline, state, record)
    return build()


def _largest(value: Any) -> float:
    numbers = value if isinstance(value, (list, tuple)) else [value]
    return max((number for number in numbers if isinstance(number, (int, float))), default=0)
