"""Writing a model for other programs: the published layout, safetensors, diffusers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tinyfusion_pl.artifacts import ArtifactError, atomic_path, save_tensors, temporary_path
from tinyfusion_pl.locks import remove_strays
from tinyfusion_pl.models.pretrained import load_pretrained
from tinyfusion_pl.models.registry import get_family
from tinyfusion_pl.pruning.run_maps import get_maps

FORMATS = ("published", "safetensors", "diffusers")


def export(model: str, output: str, format: str | None = None, vae: str | None = None) -> str:
    """The command ``export``: `load_pretrained` of `model`, then `export_model`; reports the file."""
    loaded = load_pretrained(model)
    path = export_model(loaded, output, format=format, vae=vae)
    num_params = sum(p.numel() for p in loaded.parameters())
    return (
        f"{path}: {loaded.model_name}, {num_params / 1e6:.1f}M parameters, as "
        f"{format or _get_format(Path(output))}."
    )


def export_model(
    model: nn.Module,
    path: str | Path,
    *,
    format: str | None = None,
    vae: str | Path | None = None,
    id2label: Mapping[int, str] | None = None,
) -> Path:
    """Write `model` for other programs.

    - ``"published"``: a ``.pt`` file that the original repository loads: a bare state dict with its
      names; for MAR, under ``model`` and ``model_ema``.
    - ``"safetensors"``: the same names, with the model's name and arguments as metadata, so that
      `load_pretrained` needs nothing else.
    - ``"diffusers"`` (DiT only): a folder for ``DiTTransformer2DModel.from_pretrained``; with
      `vae`, one for ``DiTPipeline.from_pretrained``: ``transformer/``, ``scheduler/`` (DDIM with
      DiT's schedule), ``vae/`` and ``model_index.json``.

    diffusers embeds timesteps with a frequency shift of 1. A model with ``frequency_shift=0``, as
    all published ones except diffusers' own, has other outputs there (docs/checkpoints.md has the
    figures), and a warning says so; likewise in the other direction.

    Args:
        model: A model of this project, shallow or dense.
        path: File or folder to write; a folder must be new or empty.
        format: See above; by default from the suffix of `path`, a folder without one.
        vae: Folder of diffusers' AutoencoderKL, or of a pipeline with ``vae/``; it is copied.
        id2label: Class names for DiTPipeline, several names of a class separated by commas.
            Default: ImageNet's for 1000 classes, otherwise the numbers.

    Returns:
        `path`.

    Raises:
        ValueError: The format is unknown, does not match the suffix or does not support the model,
            or the model has linear maps in place of removed blocks.
        ArtifactError: The file could not be written, or `vae` has no matching AutoencoderKL.
    """
    path = Path(path)
    format = format or _get_format(path)
    if format not in FORMATS:
        raise ValueError(f"Unknown format {format!r}; expected one of {', '.join(FORMATS)}.")
    if not hasattr(model, "model_name") or not hasattr(model, "config"):
        raise ValueError(
            f"Cannot export a {type(model).__name__}: only models of this project (create_model, "
            "load_pretrained) have a known layout."
        )
    if maps := get_maps(model):
        raise ValueError(
            f"The model has linear maps in place of removed blocks ({maps[0].module}, "
            f"{maps[0].position} it), which other programs do not support. Its folder opens with "
            "load_shallow; for an export, recover a model without them (recover.replace=null)."
        )
    if (format == "diffusers") != (path.suffix == "") or (format == "safetensors") != (
        path.suffix == ".safetensors"
    ):
        raise ValueError(
            f"Format {format!r} does not match {path}: 'published' writes a .pt file, 'safetensors' "
            "a .safetensors file, 'diffusers' a folder, whose name has no suffix."
        )
    if format != "diffusers" and (vae is not None or id2label is not None):
        raise ValueError(f"vae and id2label require format 'diffusers', got {format!r}.")
    remove_strays(path.parent, of=path)  # of a killed export
    family = get_family(type(model))
    if format == "diffusers":
        _export_diffusers(model, path, vae=vae, id2label=id2label)
        return path
    if family is not None and family.check_export is not None:
        family.check_export(model, format)
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    if format == "published":
        convert = None if family is None else family.to_published
        _save_torch(state if convert is None else convert(state), path)
    else:
        metadata = {"format": "pt", "model": model.model_name, "config": json.dumps(model.config)}
        save_tensors(path, state, metadata=metadata)
    return path


def _get_format(path: Path) -> str:
    return {"": "diffusers", ".safetensors": "safetensors"}.get(path.suffix, "published")


def _save_torch(content: Any, path: Path) -> None:
    with atomic_path(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # torch's error for a full disk
            raise ArtifactError(
                f"Cannot write {path}: {error}. Check the disk. No file was left behind."
            ) from error


def _export_diffusers(
    model: nn.Module, path: Path, *, vae: str | Path | None, id2label: Mapping[int, str] | None
) -> None:
    family = get_family(type(model))
    if family is None or family.diffusers is None:
        raise ValueError(
            f"diffusers has no {type(model).__name__}. Export it as 'published' or 'safetensors'."
        )
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ValueError(f"{path} exists. Give a new folder, or remove it.")
    temporary = temporary_path(path)
    try:
        family.diffusers.write(
            model, temporary, vae=None if vae is None else Path(vae), id2label=id2label
        )
        if family.check_export is not None:
            family.check_export(model, "diffusers")
        with suppress(FileNotFoundError):
            path.rmdir()  # empty
        temporary.rename(path)
    except OSError as error:
        raise ArtifactError(
            f"Cannot write {path}: {error.strerror or error}. Check the path and the disk. No "
            "folder was left behind."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
