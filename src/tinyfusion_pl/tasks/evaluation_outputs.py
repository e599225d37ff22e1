"""The files of an evaluation: ``metrics.json`` and the images that the report shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from tinyfusion_pl.artifacts import save_tensors, write_json
from tinyfusion_pl.models.records import TRAINING_IMAGES
from tinyfusion_pl.objectives import ImageSampler
from tinyfusion_pl.report import write_grid
from tinyfusion_pl.tasks.folder import Inputs, RunFolder
from tinyfusion_pl.tasks.results import METRICS, gathered
from tinyfusion_pl.tasks.timing import on_device

SAMPLES = "samples.safetensors"


def draw_shown(
    samplers: Mapping[str, ImageSampler], labels: Tensor, *, device: torch.device
) -> dict[str, Tensor]:
    """The images that the report shows: of each model the first ones, with their labels (N,)."""
    indices = torch.arange(len(labels))
    images = {
        role: sampler(indices, labels, device=on_device(sampler, device)).cpu()
        for role, sampler in samplers.items()
        if len(labels)
    }
    return {"labels": labels, **images}


@rank_zero_only
def write_outputs(
    folder: RunFolder,
    inputs: Inputs,
    *,
    roles: Sequence[str],
    speed: Mapping[str, float],
    shown: Mapping[str, Tensor],
    reference: str | None,
    protocol: Mapping[str, Any],
    write_grids: bool,
) -> dict[str, Any]:
    """Write ``metrics.json``, whose content is returned, and the images of `draw_shown`."""
    save_tensors(folder / SAMPLES, dict(shown))
    if write_grids:
        for role in shown.keys() - {"labels"}:
            write_grid(folder / f"samples_{role}.png", shown[role])
    source = getattr(inputs.teacher, "source", {})
    results: dict[str, Any] = {
        "name": inputs.name,
        "reference": reference or type(inputs.data).__name__,
        **gathered(folder, roles, speed, source.get(TRAINING_IMAGES)),
        "protocol": protocol,
    }
    write_json(folder / METRICS, results)
    return results
