"""Optimizers beside torch's own, and torch's own in their fastest form."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

FUSED_ON = ("cuda",)  # devices; on a CPU the numbers stay those of the plain form


def adamw_8bit(
    parameters: Iterable[nn.Parameter], *, lr: float, weight_decay: float = 0.0, **options: Any
) -> torch.optim.Optimizer:
    """AdamW that keeps its two averages in 8 bits (Dettmers et al., arXiv 2110.02861), by bitsandbytes.

    2 bytes a parameter instead of 8. Tensors of fewer than 4096 elements keep 32 bits.

    Args:
        parameters: What it trains.
        lr: Learning rate.
        weight_decay: Weight decay.
        options: Further arguments of ``bitsandbytes.optim.AdamW8bit``.

    Raises:
        ValueError: where bitsandbytes is not installed.
    """
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(
            "The 8-bit AdamW is that of bitsandbytes, which is not installed. Run pip install "
            "'tinyfusion_pl[eight_bit]', or give optimizer=adamw."
        ) from error
    return AdamW8bit(parameters, lr=lr, weight_decay=weight_decay, **options)


def use_fused(optimizer: torch.optim.Optimizer) -> None:
    """Have Adam or AdamW step all parameters in one kernel where they are on a GPU, unless told otherwise.

    The optimizer is not told that it is fused (``_step_supports_amp_scaling``): it would unscale
    gradients itself, and Lightning would refuse to clip them.
    """
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return
    for group in optimizer.param_groups:
        told = group["fused"] is not None or group["foreach"] is not None or group["differentiable"]
        if not told and all(
            p.device.type in FUSED_ON and p.is_floating_point() for p in group["params"]
        ):
            group["fused"] = True
