"""Checksums of models, files and configurations, and files that contain their own checksum.

An `Origin` states what something was computed from, name -> checksum: the weights as loaded (not
their path), the data, the reference, the configuration. It is stored with every result and compared
before the result is reused.
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
SEAL = "sha256"  # entry of a sealed file: checksum of all others
NUM_DIGITS = 12  # of checksums in messages


class DamagedError(ArtifactError):
    """The content of a file does not match its checksum."""


Damaged = DamagedError  # former name


# -- checksums
def content_sha256(content: Any) -> str:
    """The SHA-256 of plain data, as JSON with sorted keys."""
    return hashlib.sha256(_canonical(content).encode()).hexdigest()


def state_sha256(tensors: Mapping[str, Tensor], *, preface: str = "") -> str:
    """The SHA-256 of names, types, shapes and values of tensors, after that of `preface`."""
    kinds = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}
    return tensors_sha256(tensors, preface=preface + _canonical(kinds))


def model_sha256(model: nn.Module) -> str:
    """The SHA-256 of a model as loaded: weights and buffers, class and arguments."""
    built = [
        type(model).__name__,
        getattr(model, "model_name", None),
        getattr(model, "config", None),
    ]
    return state_sha256(model.state_dict(), preface=json.dumps(built, sort_keys=True, default=str))


def files_sha256(root: Path, names: Sequence[str]) -> dict[str, str]:
    """Checksums of the files `names` below `root` that exist, and of all files in such folders."""
    found: dict[str, str] = {}
    for name in names:
        path = root / name
        files = (
            sorted(each for each in path.rglob("*") if each.is_file())
            if path.is_dir()
            else [path] * path.is_file()
        )
        # hidden files are temporary ones of killed processes
        whole = (file for file in files if not file.name.startswith("."))
        found |= {file.relative_to(root).as_posix(): sha256(file) for file in whole}
    return found


def short(checksum: str | None) -> str:
    """The first digits of a checksum, for messages."""
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
    """Entries of `now` (or those in `of`) that differ from `kept`, with both checksums.

    Empty where all are equal.
    """
    kept = kept or {}
    parts = [name for name in now if of is None or name in of]
    return ", ".join(
        f"{name} {short(kept.get(name))} then, {short(now[name])} now"
        for name in parts
        if kept.get(name) != now[name]
    )


# -- files that contain their checksum
def write_sealed(path: str | os.PathLike, content: Mapping[str, Any]) -> None:
    """Write `content` as JSON with its checksum."""
    write_json(path, {**content, SEAL: content_sha256(content)})


def read_sealed(path: str | os.PathLike) -> dict[str, Any]:
    """Read a file of `write_sealed`, without the checksum.

    Raises:
        DamagedError: The file is damaged, or something else.
    """
    try:
        content = read_json(path)
    except ArtifactError as error:
        reason = (
            "it is truncated or not JSON"
            if isinstance(error.__cause__, ValueError)
            else str(error).rstrip(".")
        )
        raise DamagedError(f"{path} is damaged: {reason}.") from error
    if not isinstance(content, dict) or SEAL not in content:
        raise DamagedError(
            f"{path} has no checksum: it is damaged, or an earlier version wrote it."
        )
    seal = content.pop(SEAL)
    if seal != content_sha256(content):
        raise DamagedError(f"{path} is damaged: its content does not match its checksum.")
    return content


def save_sealed_tensors(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], *, made_from: Origin
) -> None:
    """Write tensors as safetensors, with their origin `made_from` and the checksum of both."""
    seal = {"made_from": made_from, SEAL: state_sha256(tensors, preface=_canonical(made_from))}
    # one entry: the order of several is random
    save_tensors(path, dict(tensors), metadata={"seal": json.dumps(seal)})


def load_sealed_tensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], Origin]:
    """Read a file of `save_sealed_tensors`: its tensors and their origin.

    Raises:
        DamagedError: The file is damaged, or something else.
    """
    try:
        tensors, seal = load_tensors(path), json.loads(read_metadata(path)["seal"])
        made_from, expected = seal["made_from"], seal[SEAL]
        found = state_sha256(tensors, preface=_canonical(made_from))
    except Exception as error:  # damaged headers show as errors of many types
        raise DamagedError(f"{path} is damaged ({error}).") from error
    if found != expected or not isinstance(made_from, dict):
        raise DamagedError(f"{path} is damaged: its content does not match its checksum.")
    return tensors, made_from


def _canonical(content: Any) -> str:
    plain = json.loads(json.dumps(content))  # as it is read back: lists for tuples, texts for keys
    return json.dumps(plain, sort_keys=True)
