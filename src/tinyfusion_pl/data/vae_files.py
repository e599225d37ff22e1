"""An AutoencoderKL from a folder of diffusers: its config is held against its weights before a model takes memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from tinyfusion_pl.artifacts import ArtifactError, read_json
from tinyfusion_pl.data.vae_keys import as_diffusers
from tinyfusion_pl.models.fitting import check_values
from tinyfusion_pl.models.notices import first_line
from tinyfusion_pl.models.weight_files import read_folder_weights

CONFIG, CLASS = "config.json", "AutoencoderKL"
NUM_NAMED = 3


def vae_folder(path: Path) -> Path:
    """Where in `path`, a folder of a VAE or of a pipeline, the AutoencoderKL lies.

    Raises:
        ArtifactError: nowhere.
    """
    for folder in (path, path / "vae"):
        if (folder / CONFIG).is_file() and CLASS in (folder / CONFIG).read_text(
            encoding="utf-8", errors="replace"
        ):
            return folder
    raise ArtifactError(
        f"{path} holds no VAE: neither config.json of an AutoencoderKL nor a folder vae/ with one. Give a folder as "
        "diffusers writes it: config.json and diffusion_pytorch_model.safetensors."
    )


def read_vae_folder(folder: Path, *, variant: str | None) -> Any:
    """The AutoencoderKL in `folder`, float32.

    Raises:
        ArtifactError: a file is missing or broken, or config and weights do not go together.
        ValueError: there are several variants and none is given.
    """
    remedy = f"Put diffusion_pytorch_model.safetensors of this VAE into {folder}."
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or config.get("_class_name") != CLASS:
        found = config.get("_class_name") if isinstance(config, dict) else type(config).__name__
        raise ArtifactError(
            f"{folder / CONFIG} is of {found!r}; an {CLASS!r} was expected. Give the folder of one."
        )
    try:
        state, file = read_folder_weights(folder, variant=variant)
    except ArtifactError as error:
        raise ArtifactError(f"The VAE {folder} cannot be loaded ({error}). {remedy}") from error
    state = as_diffusers(state)
    build = _builder(config, state, folder)
    with torch.device("meta"):
        outline = build().state_dict()
    lacking = [
        key for key, value in outline.items() if key not in state or state[key].shape != value.shape
    ]
    if lacking:
        raise ArtifactError(
            f"The VAE {folder} lacks {len(lacking)} weights, {', '.join(lacking[:NUM_NAMED])} among them, of "
            "the shapes that "
            f"its {CONFIG} asks for. {remedy}"
        )
    if rest := [key for key in state if key not in outline]:
        rank_zero_warn(
            f"{file} holds {len(rest)} weights that its {CONFIG} does not know, which are left out: "
            f"{', '.join(rest[:NUM_NAMED])}."
        )
    state = {key: state[key] for key in outline}
    check_values(state, file)
    model = build()
    model.load_state_dict(state)
    return model


def _builder(
    config: Mapping[str, Any], state: Mapping[str, Tensor], folder: Path
) -> Callable[[], Any]:
    """What builds the model of `config`, whose counts must not be larger than there are tensors."""
    from diffusers import AutoencoderKL  # seconds to import, and only needed here

    for name in ("layers_per_block", "block_out_channels", "down_block_types", "up_block_types"):
        value = config.get(name, 1)
        count = len(value) if isinstance(value, list) else value
        if not isinstance(count, int) or count > len(state):
            raise ArtifactError(
                f"{folder / CONFIG}: {name!r} is {value!r:.80}, and the weights beside it are {len(state)} tensors. "
                "Copy the folder again."
            )

    def build() -> Any:
        try:
            return AutoencoderKL.from_config(dict(config))
        except Exception as error:  # what a wrong setting ends in is up to diffusers
            raise ArtifactError(
                f"{folder / CONFIG} describes no {CLASS} ({type(error).__name__}: {first_line(error)}). "
                "Copy the folder again."
            ) from error

    return build
