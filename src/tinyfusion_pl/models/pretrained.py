"""Trained denoisers: those the package ships and those in a file."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from torch import nn

from tinyfusion_pl.artifacts import sha256
from tinyfusion_pl.models.checkpoints import load_weights
from tinyfusion_pl.models.registry import create_model

SHIPPED = {"dit_digits": "digits_teacher"}
PUBLISHED = {"dit_xl_2": "https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-256x256.pt"}


def load_denoiser(name: str, *, checkpoint: str | Path | None = None, weights: str = "ema", **overrides: Any) -> nn.Module:
    """A trained model in evaluation mode; its ``source`` says where the weights came from.

    Args:
        name: Of the registry, see `list_models`.
        checkpoint: ``"shipped"`` for weights in the package, or a file: ``.safetensors``, ``.pt``, ``.ckpt``.
        weights: ``"ema"`` or ``"raw"``, where the file has both.
        overrides: Arguments of the model, e.g. ``depth=14``.

    Raises:
        ValueError: when no checkpoint is given or it does not fit the model; says how to get one.
        ArtifactError: for a missing or broken file.
    """
    model = create_model(name, **overrides)
    if checkpoint is None:
        where = f" The published one is {PUBLISHED[name]}; download it and" if name in PUBLISHED else " Train one, or"
        raise ValueError(f"Model {name!r} has no weights: model.checkpoint is not set.{where} give model.checkpoint=PATH.")
    if checkpoint == "shipped":
        if name not in SHIPPED:
            raise ValueError(f"The package ships weights for {', '.join(SHIPPED)}, not for {name!r}; give model.checkpoint=PATH.")
        with as_file(files("tinyfusion_pl") / "assets" / SHIPPED[name] / "model.safetensors") as path:
            load_weights(model, path)
            model.source = {"path": f"shipped:{SHIPPED[name]}", "sha256": sha256(path)}
    else:
        load_weights(model, checkpoint, weights=weights)
        model.source = {"path": str(checkpoint), "sha256": sha256(checkpoint), "weights": weights}
    return model.eval()
