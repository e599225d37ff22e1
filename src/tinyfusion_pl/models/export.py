"""Writing a model for other programs: the published layout, safetensors, diffusers."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tinyfusion_pl.artifacts import (
    ArtifactError,
    atomic_path,
    read_json,
    save_tensors,
    temporary_path,
    write_json,
)
from tinyfusion_pl.locks import remove_strays
from tinyfusion_pl.models.diffusers_layout import CONFIG, diffusers_config, to_diffusers
from tinyfusion_pl.models.dit import DiT
from tinyfusion_pl.models.families import detect_family
from tinyfusion_pl.models.pretrained import load_pretrained
from tinyfusion_pl.models.published import DIFFUSERS_WEIGHTS
from tinyfusion_pl.pruning.run_maps import get_maps

FORMATS = ("published", "safetensors", "diffusers")
# The schedule that DiT was trained with (objectives.GaussianDiffusion); DDIM is what facebook/DiT-XL-2-256 comes with.
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "clip_sample": False,
    "prediction_type": "epsilon",
    "set_alpha_to_one": True,
    "steps_offset": 0,
}
# What DiTPipeline takes for the null label, whatever the model.
PIPELINE_NUM_CLASSES = 1000


def export(model: str, output: str, format: str | None = None, vae: str | None = None) -> str:
    """The command line's word: `load_pretrained` of `model`, then `export_model`; says what was written."""
    loaded = load_pretrained(model)
    path = export_model(loaded, output, format=format, vae=vae)
    num_params = sum(p.numel() for p in loaded.parameters())
    return f"{path}: {loaded.model_name}, {num_params / 1e6:.1f}M parameters, as {format or _get_format(Path(output))}."


def export_model(
    model: nn.Module,
    path: str | Path,
    *,
    format: str | None = None,
    vae: str | Path | None = None,
    id2label: Mapping[int, str] | None = None,
) -> Path:
    """Write `model` for other programs.

    - ``"published"``: a ``.pt`` file that the original repository loads: DiT's and SiT's a bare state dict with their names; MAR's under
      ``model`` and ``model_ema``.
    - ``"safetensors"``: the same names; the model's name and arguments go beside them, so `load_pretrained` needs nothing else.
    - ``"diffusers"`` (DiT only): without `vae` a folder for ``DiTTransformer2DModel.from_pretrained``; with it one for
      ``DiTPipeline.from_pretrained``: ``transformer/``, ``scheduler/`` (DDIM on DiT's schedule), ``vae/``, ``model_index.json``.

    diffusers embeds timesteps with a frequency shift of 1. A model with ``frequency_shift=0``, as all published ones but diffusers' own,
    gives other outputs there (docs/checkpoints.md has the figures): a warning says so. The other way round likewise.

    Args:
        model: One of this project's models, shallow or not.
        path: File or folder to write; a folder that holds something is refused.
        format: See above; default: by the suffix of `path`, a folder where it has none.
        vae: A folder that diffusers' AutoencoderKL was saved in, or a pipeline's, of which ``vae/`` is taken; it is copied.
        id2label: Names of the classes for DiTPipeline, several of one class separated by commas. Default: ImageNet's of 1000 classes, else
            the numbers.

    Returns:
        `path`.

    Raises:
        ValueError: the format is unknown or does not go with the suffix, the model is none that the format has, or it has linear maps in
            place of removed blocks.
        ArtifactError: it cannot be written, or `vae` holds no matching AutoencoderKL.
    """
    path = Path(path)
    format = format or _get_format(path)
    if format not in FORMATS:
        raise ValueError(f"Format {format!r} is unknown; give one of {', '.join(FORMATS)}.")
    if not hasattr(model, "model_name") or not hasattr(model, "config"):
        raise ValueError(
            f"A {type(model).__name__} is no model of this project (create_model, load_pretrained), whose layout is known."
        )
    if maps := get_maps(model):
        raise ValueError(
            f"The model has linear maps in place of removed runs of blocks ({maps[0].module}, {maps[0].position} it), which "
            "no other program knows of. load_shallow opens its folder as it is; export a model that was recovered without "
            "them (recover.replace=null)."
        )
    if (format == "diffusers") != (path.suffix == "") or (format == "safetensors") != (
        path.suffix == ".safetensors"
    ):
        raise ValueError(
            f"Format {format!r} does not go with {path}: 'published' writes a .pt file, 'safetensors' a .safetensors file, "
            "'diffusers' a folder, whose name has no suffix."
        )
    if format != "diffusers" and (vae is not None or id2label is not None):
        raise ValueError(f"vae and id2label belong to format 'diffusers', not to {format!r}.")
    remove_strays(path.parent, of=path)  # what a killed export left
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    if format == "published":
        _warn_of_shift(model, 0, "the original DiT code")
        _save_torch(
            {"model": state, "model_ema": state} if detect_family(state) == "MAR" else state, path
        )
    elif format == "safetensors":
        save_tensors(
            path,
            state,
            metadata={
                "format": "pt",
                "model": model.model_name,
                "config": json.dumps(model.config),
            },
        )
    else:
        _export_diffusers(model, path, vae=vae, id2label=id2label)
    return path


def _get_format(path: Path) -> str:
    return {"": "diffusers", ".safetensors": "safetensors"}.get(path.suffix, "published")


def _warn_of_shift(model: nn.Module, theirs: int, program: str) -> None:
    if isinstance(model, DiT) and (ours := model.config["frequency_shift"]) != theirs:
        warnings.warn(
            f"This model embeds timesteps with frequency_shift={ours}, {program} with {theirs}: its outputs there differ "
            "(docs/checkpoints.md, 'The shift gap').",
            stacklevel=4,
        )


def _save_torch(content: Any, path: Path) -> None:
    with atomic_path(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # how torch says that the disk is full
            raise ArtifactError(
                f"Cannot write {path}: {error}. Check the disk. Nothing was left behind under that name."
            ) from error


def _export_diffusers(
    model: nn.Module, path: Path, *, vae: str | Path | None, id2label: Mapping[int, str] | None
) -> None:
    if type(model) is not DiT:
        raise ValueError(
            f"diffusers has no {type(model).__name__}; only a DiT can be exported to it. Give 'published' or 'safetensors'."
        )
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ValueError(f"{path} exists. Give a new folder, or remove it.")
    config = diffusers_config(model.config)
    state = to_diffusers(model.state_dict(), model.config)
    of = {"_diffusers_version": version("diffusers")}
    source = None if vae is None else _vae_folder(Path(vae), config)
    if source is None and id2label is not None:
        raise ValueError("id2label is of a pipeline, which needs vae=FOLDER.")
    _warn_of_shift(model, 1, "diffusers")
    temporary = temporary_path(path)
    try:
        transformer = temporary if source is None else temporary / "transformer"
        save_tensors(transformer / DIFFUSERS_WEIGHTS[0], state, metadata={"format": "pt"})
        write_json(transformer / CONFIG, {**config, **of})
        if source is not None:
            write_json(temporary / "scheduler" / "scheduler_config.json", {**SCHEDULER, **of})
            shutil.copytree(source, temporary / "vae")
            write_json(
                temporary / "model_index.json",
                {
                    "_class_name": "DiTPipeline",
                    **of,
                    "id2label": _labels(config["num_embeds_ada_norm"], id2label),
                    "scheduler": ["diffusers", "DDIMScheduler"],
                    "transformer": ["diffusers", "DiTTransformer2DModel"],
                    "vae": ["diffusers", "AutoencoderKL"],
                },
            )
        with suppress(FileNotFoundError):
            path.rmdir()  # empty
        temporary.rename(path)
    except OSError as error:
        raise ArtifactError(
            f"Cannot write {path}: {error.strerror or error}. Check the path and the disk. "
            "Nothing was left behind."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _vae_folder(folder: Path, config: Mapping[str, Any]) -> Path:
    """Where in `folder` the AutoencoderKL lies."""
    found = folder if (folder / CONFIG).is_file() else folder / "vae"
    if not (found / CONFIG).is_file():
        raise ArtifactError(
            f"{folder} holds no AutoencoderKL: config.json or vae/config.json was expected. Give the folder of one."
        )
    stated = read_json(found / CONFIG)
    if stated.get("_class_name") != "AutoencoderKL":
        raise ArtifactError(
            f"{found} holds a {stated.get('_class_name')!r}; DiTPipeline takes an AutoencoderKL."
        )
    if stated.get("latent_channels") != config["in_channels"]:
        raise ArtifactError(
            f"The latents of the VAE in {found} have {stated.get('latent_channels')} channels, the model takes "
            f"{config['in_channels']}. Give the VAE that its latents were made with."
        )
    return found


def _labels(num_classes: int, id2label: Mapping[int, str] | None) -> dict[str, str]:
    if num_classes != PIPELINE_NUM_CLASSES:
        warnings.warn(
            f"DiTPipeline takes {PIPELINE_NUM_CLASSES} for the null label, this model {num_classes}: there it samples with "
            "guidance_scale=1 only.",
            stacklevel=4,
        )
    if id2label is None:
        if num_classes != 1000:
            return {str(label): str(label) for label in range(num_classes)}
        from timm.data import ImageNetInfo

        return {str(label): name for label, name in enumerate(ImageNetInfo().label_descriptions())}
    if sorted(map(int, id2label)) != list(range(num_classes)):
        raise ValueError(
            f"id2label must name the classes 0 .. {num_classes - 1}; it names {len(id2label)}."
        )
    return {str(label): str(id2label[label]) for label in sorted(id2label, key=int)}
