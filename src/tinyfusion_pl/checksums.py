"""What a result belongs to: checksums of models, files and configurations, and files that carry a checksum of their own.

An `Origin` says what something was made from, name -> checksum: the weights as they were loaded (not the path that they came
from), the data, the reference, the configuration. It is kept with every result, and compared before the result is used again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tinyfusion_pl.artifacts import (
    ArtifactError,
    load_tensors,
    read_json,
    read_metadata,
    save_tensors,
    sha256,
    tensors_sha256,
    write_json,
)

Origin = dict[str, str]
SEAL = "sha256"  # the entry of a sealed file that holds the checksum of all others
NUM_DIGITS = 12  # of checksums in messages


class Damaged(ArtifactError):
    """A file whose content does not match the checksum in it."""


# -- checksums
def content_sha256(content: Any) -> str:
    """The SHA-256 of plain data, as JSON with sorted keys."""
    return hashlib.sha256(_canonical(content).encode()).hexdigest()


def state_sha256(tensors: Mapping[str, Tensor], *, preface: str = "") -> str:
    """The SHA-256 of names, types, shapes and values of tensors, after that of `preface`."""
    kinds = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}
    return tensors_sha256(tensors, preface=preface + _canonical(kinds))


def model_sha256(model: nn.Module) -> str:
    """The SHA-256 of a model as it was loaded: weights and buffers, class, and the arguments that it was built with."""
    built = [
        type(model).__name__,
        getattr(model, "model_name", None),
        getattr(model, "config", None),
    ]
    return state_sha256(model.state_dict(), preface=json.dumps(built, sort_keys=True, default=str))


def files_sha256(root: Path, names: Sequence[str]) -> dict[str, str]:
    """Checksums of files below `root`: of those named, as far as they exist, and of all in folders that are named."""
    found: dict[str, str] = {}
    for name in names:
        path = root / name
        files = (
            sorted(each for each in path.rglob("*") if each.is_file())
            if path.is_dir()
            else [path] * path.is_file()
        )
        whole = (
            file for file in files if not file.name.startswith(".")
        )  # what a killed process left is hidden
        found |= {file.relative_to(root).as_posix(): sha256(file) for file in whole}
    return found


def short(checksum: str | None) -> str:
    """The beginning of a checksum, for a message."""
    return (
        "unknown"
        if checksum is None
        else checksum
        if len(checksum) <= NUM_DIGITS
        else f"{checksum[:NUM_DIGITS]}..."
    )


def differences(
    kept: Mapping[str, str] | None, now: Mapping[str, str], *, of: Sequence[str] | None = None
) -> str:
    """What of `now` (or of the parts `of` alone) is not as in `kept`, each with both checksums; empty where all is equal."""
    kept = kept or {}
    parts = [name for name in now if of is None or name in of]
    return ", ".join(
        f"{name} {short(kept.get(name))} then, {short(now[name])} now"
        for name in parts
        if kept.get(name) != now[name]
    )


# -- files that carry their checksum
def write_sealed(path: str | os.PathLike, content: Mapping[str, Any]) -> None:
    """Write `content` as JSON with the checksum of all of it."""
    write_json(path, {**content, SEAL: content_sha256(content)})


def read_sealed(path: str | os.PathLike) -> dict[str, Any]:
    """What `write_sealed` wrote, without the checksum.

    Raises:
        Damaged: when it is not that.
    """
    try:
        content = read_json(path)
    except ArtifactError as error:
        reason = (
            "it is truncated or no JSON"
            if isinstance(error.__cause__, ValueError)
            else str(error).rstrip(".")
        )
        raise Damaged(f"{path} is damaged: {reason}.") from error
    if not isinstance(content, dict) or SEAL not in content:
        raise Damaged(f"{path} has no checksum: it is damaged, or an earlier version wrote it.")
    seal = content.pop(SEAL)
    if seal != content_sha256(content):
        raise Damaged(f"{path} is damaged: its content does not match its checksum.")
    return content


def save_sealed_tensors(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], *, made_from: Origin
) -> None:
    """Write tensors as safetensors, with what they were `made_from` and the checksum of both."""
    seal = {"made_from": made_from, SEAL: state_sha256(tensors, preface=_canonical(made_from))}
    save_tensors(
        path, dict(tensors), metadata={"seal": json.dumps(seal)}
    )  # one entry: the order of several is random


def load_sealed_tensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], Origin]:
    """The tensors that `save_sealed_tensors` wrote, and what they were made from.

    Raises:
        Damaged: when they are not that.
    """
    try:
        tensors, seal = load_tensors(path), json.loads(read_metadata(path)["seal"])
        made_from, expected = seal["made_from"], seal[SEAL]
        found = state_sha256(tensors, preface=_canonical(made_from))
    except Exception as error:  # damaged headers show as errors of many types
        raise Damaged(f"{path} is damaged ({error}).") from error
    if found != expected or not isinstance(made_from, dict):
        raise Damaged(f"{path} is damaged: its content does not match its checksum.")
    return tensors, made_from


def _canonical(content: Any) -> str:
    plain = json.loads(json.dumps(content))  # as it is read back: lists for tuples, texts for keys
    return json.dumps(plain, sort_keys=True)
