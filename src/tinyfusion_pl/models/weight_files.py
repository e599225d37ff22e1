"""The weights in a folder of diffusers: safetensors or bin, of one variant or another, in one file or several."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from torch import Tensor

from tinyfusion_pl.artifacts import ArtifactError, load_tensors, read_json, sha256
from tinyfusion_pl.models.checkpoints import load_checkpoint
from tinyfusion_pl.models.notices import warn
from tinyfusion_pl.models.published import DIFFUSERS_WEIGHTS
from tinyfusion_pl.models.records import NAMES, check, field

STEM = DIFFUSERS_WEIGHTS[0].partition(".")[0]
# diffusion_pytorch_model[.VARIANT].safetensors, and the index of several:
# diffusion_pytorch_model.safetensors.index[.VARIANT].json
SINGLE = re.compile(rf"{STEM}(?:\.(?P<variant>[^.]+))?\.(?P<kind>safetensors|bin)")
INDEX = re.compile(rf"{STEM}\.(?P<kind>safetensors|bin)\.index(?:\.(?P<variant>[^.]+))?\.json")


def read_folder_weights(
    folder: str | Path, *, variant: str | None = None
) -> tuple[dict[str, Tensor], Path]:
    """The state dict in `folder`, and the file that it is from (the index, of several).

    Args:
        variant: The ``fp16`` of ``diffusion_pytorch_model.fp16.safetensors``; None: the plain file
            or, where there is none, the only variant that is there, which is then said.

    Raises:
        ArtifactError: nothing is there, or not that variant, or a part is missing or broken.
        ValueError: there is no plain file and several variants.
    """
    folder, found = Path(folder), _files(Path(folder))
    if not found:
        raise ArtifactError(
            f"{folder} has no weights: {' or '.join(DIFFUSERS_WEIGHTS)} was expected beside config.json. "
            "Copy the folder again."
        )
    if variant not in found:
        there = ", ".join(f"{file.name}" for file in found.values())
        if variant is not None:
            raise ArtifactError(
                f"{folder} has no weights of variant {variant!r}; it has {there}. Give variant=null for the plain file, or "
                "the variant that is there."
            )
        if len(found) > 1:
            raise ValueError(
                f"{folder} has no plain weights and several variants: {there}. Give the one that is meant, e.g. "
                f"variant={next(iter(found))!r}."
            )
        variant = next(iter(found))
        warn(f"{folder} has no plain weights: its only variant, {variant!r}, is taken ({there}).")
    file = found[variant]
    return (_read_parts(file) if file.suffix == ".json" else _load(file)), file


def weights_sha256(file: Path) -> str:
    """The checksum of what `read_folder_weights` read: of an index, over it and its parts."""
    if file.suffix != ".json":
        return sha256(file)
    parts = sorted(set(read_json(file)["weight_map"].values()))
    return hashlib.sha256(
        "".join(sha256(each) for each in (file, *(file.parent / part for part in parts))).encode()
    ).hexdigest()


def _files(folder: Path) -> dict[str | None, Path]:
    """Variant (None: plain) -> its file; safetensors before bin, one file before several."""
    found: dict[str | None, tuple[int, Path]] = {}
    for file in sorted(folder.iterdir()):
        single, index = SINGLE.fullmatch(file.name), INDEX.fullmatch(file.name)
        if (match := single or index) and file.exists():
            rank = 2 * (match["kind"] == "bin") + (index is not None)
            if match["variant"] not in found or rank < found[match["variant"]][0]:
                found[match["variant"]] = rank, file
    return {variant: file for variant, (_, file) in found.items()}


def _read_parts(index: Path) -> dict[str, Tensor]:
    places = field(read_json(index), "weight_map", NAMES, index)
    for name, part in places.items():
        check(part, f"weight_map.{name}", "text", index)
        if Path(part).name != part or Path(part).suffix not in (".safetensors", ".bin"):
            raise ArtifactError(
                f"{index}: 'weight_map.{name}' is {part!r:.80}; the name of a .safetensors or .bin file "
                "beside it was expected."
            )
    state: dict[str, Tensor] = {}
    for part in sorted(set(places.values())):
        held = _load(index.parent / part)
        if wrong := [name for name in held if places.get(name) != part]:
            raise ArtifactError(
                f"{index.parent / part} holds {wrong[0]}, which {index.name} says is "
                f"{'in ' + places[wrong[0]] if wrong[0] in places else 'nowhere'}. Copy the folder again."
            )
        state |= held
    if lacking := [name for name in places if name not in state]:
        raise ArtifactError(
            f"{index.parent / places[lacking[0]]} lacks {lacking[0]}, which {index.name} says it holds. Copy "
            "the folder again."
        )
    return state


def _load(file: Path) -> dict[str, Tensor]:
    return load_tensors(file) if file.suffix == ".safetensors" else load_checkpoint(file)
