"""8-bit AdamW, and fused kernels for torch's Adam and AdamW."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

FUSED_ON = ("cuda",)  # device types; the unfused results stay exactly as they are on a CPU


def adamw_8bit(
    parameters: Iterable[nn.Parameter], *, lr: float, weight_decay: float = 0.0, **options: Any
) -> torch.optim.Optimizer:
    """AdamW of bitsandbytes with 8-bit state (Dettmers et al., arXiv 2110.02861).

    The state takes 2 bytes per parameter instead of 8. Tensors with fewer than 4096 elements keep
    32-bit state.

    Args:
        parameters: Parameters to train.
        lr: Learning rate.
        weight_decay: Weight decay.
        options: Further arguments of ``bitsandbytes.optim.AdamW8bit``.

    Raises:
        ValueError: if bitsandbytes is not installed.
    """
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(
            "8-bit AdamW needs bitsandbytes, which is not installed. Run pip install "
            "'tinyfusion_pl[eight_bit]', or give optimizer=adamw."
        ) from error
    return AdamW8bit(parameters, lr=lr, weight_decay=weight_decay, **options)


def use_fused(optimizer: torch.optim.Optimizer) -> None:
    """Switch Adam and AdamW to their fused kernel on a GPU, unless another one was requested.

    ``_step_supports_amp_scaling`` stays unset: with it the optimizer would unscale gradients
    itself, and Lightning would refuse to clip them.
    """
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return
    for group in optimizer.param_groups:
        requested = (
            group["fused"] is not None or group["foreach"] is not None or group["differentiable"]
        )
        if not requested and all(
            p.device.type in FUSED_ON and p.is_floating_point() for p in group["params"]
        ):
            group["fused"] = True
