"""Reading weights from files, never executing what they hold, and putting them into a model."""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion_pl.artifacts import ArtifactError, load_tensors, read_metadata
from tinyfusion_pl.models.fitting import fit_weights
from tinyfusion_pl.models.weight_sets import NUM_NAMED, WEIGHTS, choose

DENOISER = "denoiser."
# how often the tensors of a file may be larger together than the file: tied weights are there once
MAX_TIES = 4
# How torch names what it refused to unpickle.
UNSAFE = re.compile(r"unsupported global:? (?:GLOBAL )?([\w.]+)", re.IGNORECASE)


@dataclass(frozen=True)
class Checkpoint:
    """The weights that were taken from a file, and what is known of them.

    Args:
        state: By name.
        weights: ``"ema"``, ``"raw"`` or, where the file does not say, ``"unstated"``.
        key: The entry of the file that they are from, e.g. ``"model_ema"``; None: the file is
            nothing but them.
        stated: What the file says of its model: ``model``, the name it was trained as, and
            ``config``, its arguments as JSON. The training code of DiT, SiT and MAR keeps the name
            in its ``argparse.Namespace``; `export_model` writes both into safetensors files.
    """

    state: dict[str, Tensor]
    weights: str
    key: str | None
    stated: dict[str, str]

    @property
    def source(self) -> dict[str, str]:
        """For a record: what was really taken, and from which entry where that is not called the same."""
        return {
            "weights": self.weights,
            **({} if self.key in (None, self.weights) else {"key": self.key}),
        }


def load_checkpoint(
    path: str | Path, *, weights: str = "ema", prefix: str = ""
) -> dict[str, Tensor]:
    """The state dict in a file.

    Read are ``.safetensors``; ``.pt`` and ``.pth``, bare, as ``{"ema": ..., "model": ...}`` (DiT,
    SiT) or as ``{"model_ema": ..., "model": ...}`` (MAR) and the like (docs/checkpoints.md has the
    names), an ``argparse.Namespace`` beside them allowed; and Lightning's ``.ckpt``, where weight
    averaging keeps the averaged weights under ``state_dict``, the raw under
    ``current_model_state``. Weights of the other kind than was asked for are taken with a warning
    where the file has no others.

    Args:
        path: The file.
        weights: ``"ema"``, ``"raw"``, or the name of the file's entry that is meant, e.g.
            ``"ema_0.9999"`` or ``"teacher.state_dict"``.
        prefix: Take only keys that start with it, without it; checkpoints of this project's modules
            need none.

    Raises:
        ValueError: for another `weights`, where it cannot be told which weights are meant, or when
            no key has the prefix.
        ArtifactError: for a file that is missing, truncated, without a state dict, or that would
            execute code.
    """
    return read_checkpoint(path, weights=weights, prefix=prefix).state


def read_checkpoint(path: str | Path, *, weights: str = "ema", prefix: str = "") -> Checkpoint:
    """`load_checkpoint`, with what is known of the weights."""
    path = Path(path)
    if weights not in WEIGHTS and not path.is_file():
        raise ValueError(
            f"weights is {weights!r}; give 'ema' or 'raw', or an entry of the file; and there is no file {path}."
        )
    if not path.is_file():
        raise ArtifactError(
            f"There is no checkpoint at {path}. Give the path of a .safetensors, .pt or .ckpt file."
        )
    if path.suffix == ".safetensors":
        content, stated = load_tensors(path), read_metadata(path)
    else:
        content = _unpickle(path)
        stated = _trained_as(content)
    chosen = choose(content, weights, path, prefix=prefix)
    state = _sound(chosen.state, path)
    if (
        not prefix and state and all(key.startswith(DENOISER) for key in state)
    ):  # this project's own modules
        prefix = DENOISER
    return Checkpoint(
        _without(prefix, state, path), chosen.kind, ".".join(chosen.path) or None, stated
    )


def _trained_as(content: Any) -> dict[str, str]:
    args = content.get("args") if isinstance(content, Mapping) else None
    name = vars(args).get("model") if isinstance(args, argparse.Namespace) else None
    return {"model": name} if isinstance(name, str) else {}


def _sound(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """`state`, whose tensors hold what they claim: a tensor may be a view that is larger than anything in the file."""
    for key, tensor in state.items():
        if (
            tensor.layout != torch.strided
            or tensor.is_meta
            or tensor.is_quantized
            or tensor.is_nested
        ):
            kind = (
                "meta"
                if tensor.is_meta
                else "quantized"
                if tensor.is_quantized
                else "nested"
                if tensor.is_nested
                else tensor.layout
            )
            raise ArtifactError(
                f"{path} holds {key} as a {kind} tensor; plain (strided) ones are read. Save it as tensor.to_dense(), or "
                "dequantized."
            )
    claimed, there = (
        sum(each.numel() * each.element_size() for each in state.values()),
        path.stat().st_size,
    )
    if claimed > MAX_TIES * there:
        largest = max(state, key=lambda key: state[key].numel())
        raise ArtifactError(
            f"{path} has {there} bytes, and its tensors claim {claimed}, {largest} "
            f"{tuple(state[largest].shape)} among them: "
            "it is damaged, or its tensors are expanded views. Save them with tensor.clone()."
        )
    return state


def _without(prefix: str, state: dict[str, Tensor], where: str | Path) -> dict[str, Tensor]:
    found = {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
    }
    if prefix and not found:
        raise ValueError(
            f"No key in {where} starts with {prefix!r}; it has {', '.join(list(state)[:NUM_NAMED])}."
        )
    return found


def _unpickle(path: Path) -> Any:
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped and _is_compressed(path):
            raise ArtifactError(
                f"{path} is refused: it is a compressed archive, and torch writes plain ones. Save it with torch.save."
            )
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Mapped where the format allows: of a training's checkpoint only the weights asked for
            # are read, not the optimizer's state.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except ArtifactError:
        raise
    except OSError as error:
        raise ArtifactError(f"Cannot read {path}: {error.strerror}.") from error
    # broken files show as errors of many types: RuntimeError, EOFError, IndexError, struct.error
    except Exception as error:
        if found := UNSAFE.search(str(error)):
            raise ArtifactError(
                f"{path} is refused: it holds a pickled {found[1]}, and reading that could execute code. Only tensors, plain "
                "containers and argparse.Namespace are read. Export the weights as .safetensors where you trust them."
            ) from error
        raise ArtifactError(
            f"{path} cannot be read: it is truncated or no torch checkpoint. Copy or download it again."
        ) from error


def _is_compressed(path: Path) -> bool:
    """Whether the archive says of an entry that it is packed: a small file could then become a large one in memory."""
    with zipfile.ZipFile(path) as archive:
        return any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())


def load_weights(
    model: nn.Module,
    source: str | Path | Mapping[str, Tensor],
    *,
    weights: str = "ema",
    prefix: str = "",
) -> nn.Module:
    """Put weights into `model`; every key and shape must fit.

    What training codes and wrappers put before names (``module.``, ``_orig_mod.``, ``model.``,
    nested in any order) is taken off, with a warning, where every key fits then, and in one way
    only.

    Args:
        model: Changed in place, and returned.
        source: A file (see `load_checkpoint`) or a state dict.
        weights, prefix: See `load_checkpoint`.

    Raises:
        ValueError: names missing and unexpected keys and tensors of another shape; the model is
            then unchanged. Also for weights that are all zero or not finite.
    """
    if isinstance(source, Mapping):
        return fit_weights(
            model, _without(prefix, dict(source), "the given state dict"), "The given state dict"
        )
    return fit_weights(model, load_checkpoint(source, weights=weights, prefix=prefix), source)
