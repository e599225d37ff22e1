"""A small DiT with weights everywhere, for tests of files and layouts."""

import torch

from tinyfusion_pl.models import create_model
from tinyfusion_pl.pruning import remove_blocks


def small_dit(kept=(0, 2, 3), name="dit", **overrides):
    """A DiT of 4 blocks cut to those `kept`; nothing in it is zero, so that every weight shows in the output."""
    sizes = {
        "input_size": 8,
        "in_channels": 4,
        "hidden_size": 32,
        "depth": 4,
        "num_heads": 4,
        "num_classes": 10,
    }
    model = create_model(name, **{**sizes, **overrides})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return remove_blocks(model, {"blocks": list(kept)}).eval()


def small_batch(num=6, num_classes=10):
    """Latents (num, 4, 8, 8), timesteps and labels, the null label among them."""
    t = torch.linspace(0, 999, num).long()
    y = torch.arange(num) % num_classes
    y[-1] = num_classes
    return torch.randn(num, 4, 8, 8), t, y


def relative(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
