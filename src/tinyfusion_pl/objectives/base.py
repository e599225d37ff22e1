"""What all objectives share."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from tinyfusion_pl.protocols import Denoises, Distance, Draw, Objective, mean_square

__all__ = ["Denoises", "Distance", "Draw", "Objective", "check_channels", "mean_square"]


def check_channels(denoiser: nn.Module, *, expected: int, objective: str) -> None:
    """Raise ValueError unless a `Denoiser` predicts `expected` channels per latent channel.

    Models of other classes do not state their channels and pass.
    """
    model = cast(Any, denoiser)  # attributes of a `Denoiser`, which other models lack
    config = getattr(model, "config", {})
    name = getattr(model, "model_name", type(model).__name__)
    if "in_channels" not in config or not hasattr(model, "out_channels"):
        return
    found = f"{model.out_channels} channels" if model.out_channels else "masked tokens"
    if model.out_channels != (wanted := expected * config["in_channels"]):
        raise ValueError(
            f"{name} predicts {found} for {config['in_channels']}-channel latents, but "
            f"{objective} needs {wanted} channels. Set the matching objective: "
            "objective=gaussian_diffusion for DiT and U-DiT, sit for SiT, mar for MAR, noise for "
            "U-ViT; or set the same learn_sigma in both."
        )
