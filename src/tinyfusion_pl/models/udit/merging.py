"""U-DiT with each group of feed-forward convolutions folded into one."""

from __future__ import annotations

import copy

import torch

from tinyfusion_pl.models.udit.layers import FeedForward
from tinyfusion_pl.models.udit.model import UDiT


@torch.no_grad()
def merged(model: UDiT) -> UDiT:
    """A copy of `model` with each group of feed-forward convolutions folded into one.

    Outputs are equal, with an eighth fewer parameters. The copy's ``config`` has ``merged=True``,
    and it is saved and loaded like any other. Train the unmerged model.
    """
    if model.config["merged"]:
        return copy.deepcopy(model)
    state = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, FeedForward):
            for key in [key for key in state if key.startswith(f"{name}.")]:
                del state[key]
            state.update(
                {f"{name}.{key}": value for key, value in module.merged_convolutions().items()}
            )
    with torch.device("meta"):
        new = UDiT(
            **{**model.config, "merged": True},
            activation_checkpointing=model.activation_checkpointing,
        )
    new.load_state_dict({key: value.clone() for key, value in state.items()}, assign=True)
    for name in ("model_name", "source"):
        if hasattr(model, name):
            setattr(new, name, getattr(model, name))
    return new.train(model.training)
