"""Writing a DiT for diffusers: the transformer alone, or a whole ``DiTPipeline``."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from tinyfusion_pl.artifacts import ArtifactError, read_json, save_tensors, write_json
from tinyfusion_pl.models.dit.diffusers import diffusers_config, to_diffusers
from tinyfusion_pl.models.dit.model import DiT
from tinyfusion_pl.models.notices import warn
from tinyfusion_pl.models.published import DIFFUSERS_WEIGHTS

CONFIG = "config.json"
# DiT's training schedule (objectives.GaussianDiffusion); facebook/DiT-XL-2-256 comes with DDIM.
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
PIPELINE_NUM_CLASSES = 1000  # also the null label that DiTPipeline uses for every model


def write_diffusers(
    model: nn.Module, folder: Path, *, vae: Path | None, id2label: Mapping[int, str] | None
) -> None:
    """Write `model` into the new `folder`; with `vae`, as a whole pipeline.

    Raises:
        ValueError: The model has something that diffusers' DiT does not support.
        ArtifactError: `vae` does not hold a matching AutoencoderKL.
    """
    assert isinstance(model, DiT)
    config = diffusers_config(model.config)
    state = to_diffusers(model.state_dict(), model.config)
    source = None if vae is None else _find_vae(vae, config)
    if source is None and id2label is not None:
        raise ValueError("id2label belongs to a pipeline, which requires vae=FOLDER.")
    stamp = {"_diffusers_version": version("diffusers")}
    transformer = folder if source is None else folder / "transformer"
    save_tensors(transformer / DIFFUSERS_WEIGHTS[0], state, metadata={"format": "pt"})
    write_json(transformer / CONFIG, {**config, **stamp})
    if source is None:
        return
    write_json(folder / "scheduler" / "scheduler_config.json", {**SCHEDULER, **stamp})
    shutil.copytree(source, folder / "vae")
    write_json(
        folder / "model_index.json",
        {
            "_class_name": "DiTPipeline",
            **stamp,
            "id2label": _get_labels(config["num_embeds_ada_norm"], id2label),
            "scheduler": ["diffusers", "DDIMScheduler"],
            "transformer": ["diffusers", "DiTTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )


def _find_vae(folder: Path, config: Mapping[str, Any]) -> Path:
    found = folder if (folder / CONFIG).is_file() else folder / "vae"
    if not (found / CONFIG).is_file():
        raise ArtifactError(
            f"{folder} does not hold an AutoencoderKL: expected config.json or vae/config.json. "
            "Give the folder of one."
        )
    stated = read_json(found / CONFIG)
    if stated.get("_class_name") != "AutoencoderKL":
        raise ArtifactError(
            f"{found} holds a {stated.get('_class_name')!r}; DiTPipeline takes an AutoencoderKL."
        )
    if stated.get("latent_channels") != config["in_channels"]:
        raise ArtifactError(
            f"The VAE in {found} has {stated.get('latent_channels')} latent channels, the model "
            f"takes {config['in_channels']}. Give the VAE that made its latents."
        )
    return found


def _get_labels(num_classes: int, id2label: Mapping[int, str] | None) -> dict[str, str]:
    if num_classes != PIPELINE_NUM_CLASSES:
        warn(
            f"DiTPipeline uses {PIPELINE_NUM_CLASSES} as the null label, this model "
            f"{num_classes}: the pipeline can sample with guidance_scale=1 only."
        )
    if id2label is None:
        if num_classes != PIPELINE_NUM_CLASSES:
            return {str(label): str(label) for label in range(num_classes)}
        from timm.data import ImageNetInfo

        return {str(label): name for label, name in enumerate(ImageNetInfo().label_descriptions())}
    if sorted(map(int, id2label)) != list(range(num_classes)):
        raise ValueError(
            f"id2label must name the classes 0 .. {num_classes - 1}; it names {len(id2label)}."
        )
    return {str(label): str(id2label[label]) for label in sorted(id2label, key=int)}
