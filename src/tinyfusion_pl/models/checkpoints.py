"""Reading weights from files, never executing what they hold, and putting them into a model."""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion_pl.artifacts import ArtifactError, load_tensors, read_metadata

WEIGHTS = ("ema", "raw")
NUM_NAMED = 5
DENOISER = "denoiser."
# How torch names what it refused to unpickle.
UNSAFE = re.compile(r"unsupported global:? (?:GLOBAL )?([\w.]+)", re.IGNORECASE)


def load_checkpoint(path: str | Path, *, weights: str = "ema", prefix: str = "") -> dict[str, Tensor]:
    """The state dict in a file.

    Read are ``.safetensors``; ``.pt`` and ``.pth``, bare, as ``{"ema": ..., "model": ...}`` (DiT, SiT) or as
    ``{"model_ema": ..., "model": ...}`` (MAR), an ``argparse.Namespace`` beside them allowed; and Lightning's ``.ckpt``, where weight
    averaging keeps the averaged weights under ``state_dict``, the raw under ``current_model_state``.

    Args:
        path: The file.
        weights: ``"ema"`` (where the file has both) or ``"raw"``.
        prefix: Take only keys that start with it, without it; checkpoints of this project's modules need none.

    Raises:
        ValueError: for another `weights`, or when no key has the prefix.
        ArtifactError: for a file that is missing, truncated, without a state dict, or that would execute code.
    """
    return read_checkpoint(path, weights=weights, prefix=prefix)[0]


def read_checkpoint(path: str | Path, *, weights: str = "ema", prefix: str = "") -> tuple[dict[str, Tensor], dict[str, str]]:
    """`load_checkpoint`, and what the file says of its model: ``model``, the name it was trained as, and ``config``, its arguments as JSON.

    The training code of DiT, SiT and MAR keeps the name in its ``argparse.Namespace``; `export_model` writes both into safetensors files.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights is {weights!r}; give 'ema' or 'raw'.")
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"There is no checkpoint at {path}. Give the path of a .safetensors, .pt or .ckpt file.")
    if path.suffix == ".safetensors":
        state, said = load_tensors(path), read_metadata(path)
    else:
        content = _unpickle(path)
        state, said = _state_dict(content, weights, path), {}
        args = content.get("args") if isinstance(content, Mapping) else None
        if isinstance(args, argparse.Namespace) and isinstance(getattr(args, "model", None), str):
            said = {"model": args.model}
    if not prefix and state and all(key.startswith(DENOISER) for key in state):  # this project's own modules
        prefix = DENOISER
    return _without(prefix, state, path), said


def _without(prefix: str, state: dict[str, Tensor], where: str | Path) -> dict[str, Tensor]:
    found = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if prefix and not found:
        raise ValueError(f"No key in {where} starts with {prefix!r}; it has {', '.join(list(state)[:NUM_NAMED])}.")
    return found


def _unpickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Mapped where the format allows: of a training's checkpoint only the weights asked for are read, not the optimizer's state.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError as error:
        raise ArtifactError(f"Cannot read {path}: {error.strerror}.") from error
    except Exception as error:  # broken files show as errors of many types: RuntimeError, EOFError, IndexError, struct.error
        if found := UNSAFE.search(str(error)):
            raise ArtifactError(
                f"{path} is refused: it holds a pickled {found[1]}, and reading that could execute code. Only tensors, plain "
                "containers and argparse.Namespace are read. Export the weights as .safetensors where you trust them."
            ) from error
        raise ArtifactError(
            f"{path} cannot be read: it is truncated or no torch checkpoint. Copy or download it again."
        ) from error


def _state_dict(content: Any, weights: str, path: Path) -> dict[str, Tensor]:
    order = {"ema": ["ema", "model_ema", "state_dict", "model"], "raw": ["model", "current_model_state", "state_dict", "ema", "model_ema"]}
    parts = content if isinstance(content, Mapping) else {}
    candidates = [parts[key] for key in order[weights] if isinstance(parts.get(key), Mapping)] + [content]
    for state in candidates:
        if isinstance(state, Mapping) and state and all(
            isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
        ):
            return dict(state)
    held = list(content)[:NUM_NAMED] if isinstance(content, Mapping) else type(content).__name__
    raise ArtifactError(f"{path} holds no state dict: a mapping from names to tensors, bare or under 'ema', 'model_ema', 'model' or "
                        f"'state_dict', was expected; found {held}.")


def load_weights(model: nn.Module, source: str | Path | Mapping[str, Tensor], *, weights: str = "ema", prefix: str = "") -> nn.Module:
    """Put weights into `model`; every key and shape must fit.

    Args:
        model: Changed in place, and returned.
        source: A file (see `load_checkpoint`) or a state dict.
        weights, prefix: See `load_checkpoint`.

    Raises:
        ValueError: names missing and unexpected keys and tensors of another shape; the model is then unchanged.
    """
    if isinstance(source, Mapping):
        return fit_weights(model, _without(prefix, dict(source), "the given state dict"), "The given state dict")
    return fit_weights(model, load_checkpoint(source, weights=weights, prefix=prefix), source)


def fit_weights(model: nn.Module, state: Mapping[str, Tensor], where: str | Path) -> nn.Module:
    """`load_weights` of a state dict that came from `where`."""
    own = model.state_dict()
    problems = {
        "missing": [f"{k} {tuple(own[k].shape)}" for k in own if k not in state],
        "unexpected": [f"{k} {tuple(state[k].shape)}" for k in state if k not in own],
        "of another shape": [f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}" for k in own
                             if k in state and state[k].shape != own[k].shape],
    }
    if any(problems.values()):
        said = "; ".join(f"{len(keys)} {what}: {', '.join(keys[:NUM_NAMED])}{', ...' if len(keys) > NUM_NAMED else ''}"
                         for what, keys in problems.items() if keys)
        raise ValueError(f"{where} does not fit {getattr(model, 'model_name', type(model).__name__)}: {said}. "
                         "Give the checkpoint of this model, or the model's own size and depth.")
    model.load_state_dict(state)
    return model
