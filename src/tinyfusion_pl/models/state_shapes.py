"""Counts and shapes in a state dict, checked before a model is built from them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from tinyfusion_pl.artifacts import ArtifactError

BLOCK_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")


def get_shape(
    state: Mapping[str, Tensor], key: str, num_dims: int, where: str | Path
) -> tuple[int, ...]:
    """Shape of the tensor `key`.

    Raises:
        ArtifactError: It does not have `num_dims` dimensions, or one of them is empty.
    """
    shape = tuple(state[key].shape)
    if len(shape) != num_dims or 0 in shape:
        raise ArtifactError(
            f"{where} holds {key} with shape {shape}; expected {num_dims} non-empty dimensions. The "
            "file is damaged or belongs to another model."
        )
    return shape


def count_blocks(state: Collection[str], path: str, where: str | Path) -> int:
    """Number of blocks of the list `path`.

    Raises:
        ArtifactError: The blocks are not numbered 0, 1, 2, ...
    """
    parts = (key[len(path) + 1 :].split(".")[0] for key in state if key.startswith(f"{path}."))
    numbers = {int(part) for part in parts if BLOCK_NUMBER.fullmatch(part)}
    if numbers and len(numbers) != max(numbers) + 1:
        missing = next(number for number in range(len(numbers) + 1) if number not in numbers)
        raise ArtifactError(
            f"{where} holds {len(numbers)} blocks of '{path}' up to number {max(numbers)}, but no "
            f"{path}.{missing}. Blocks are numbered 0, 1, 2, ... without gaps: the file is damaged, "
            "or blocks were dropped without renumbering the others."
        )
    return len(numbers)
