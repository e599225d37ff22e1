"""The models that an evaluation measures: the run's own, or others by path."""

from __future__ import annotations

import copy
from pathlib import Path

from torch import nn

from tinyfusion_pl.artifacts import read_metadata
from tinyfusion_pl.models import load_pretrained, load_shallow, load_weights
from tinyfusion_pl.models.records import RECORD
from tinyfusion_pl.tasks.folder import Inputs, RunFolder


def own_models(folder: RunFolder, inputs: Inputs) -> dict[str, nn.Module]:
    """Role -> model, for the run's own models that exist."""
    paths = {"pruned": folder.shallow, "recovered": folder.recovered}
    shallow = {
        role: load_shallow(path) for role, path in paths.items() if (path / RECORD).exists()
    }  # the record is written last
    return {"teacher": inputs.teacher, **shallow}


def load_model(path: str, inputs: Inputs) -> nn.Module:
    """Load a model for evaluation.

    Args:
        path: A shallow or diffusers folder, a published name, or a checkpoint of the configured
            model, of its depth or shallower.
        inputs: The configured model, and the data whose latents it must take.

    Raises:
        ValueError: if the model does not take the data's latents.
        ArtifactError: if there is no model at `path`.
    """
    teacher = inputs.teacher
    if not Path(path).is_file() or (
        Path(path).suffix == ".safetensors" and "config" in read_metadata(path)
    ):
        model = load_pretrained(path)
    elif hasattr(teacher, "model_name"):
        depths = teacher.STACKS.values()  # which the file says
        model = load_pretrained(
            path,
            name=teacher.model_name,
            **{k: v for k, v in teacher.config.items() if k not in depths},
        )
    else:
        model = load_weights(copy.deepcopy(teacher), path).eval()
    inputs.data.check_latents(model)
    return model
