"""SiT: scalable interpolant transformers (Ma et al., arXiv 2401.08740).

The network is DiT's, at continuous times in [0, 1]. Own code; parameter names and layout are those of the published checkpoints
(willisma/SiT), which are also DiT's: weights of one load into the other, and only what trained them tells them apart.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tinyfusion_pl.models.dit import DiT


class SiT(DiT):
    """Interpolant transformer; see `DiT` for the arguments.

    With `learn_sigma`, as published, the last layer has twice the channels, of which the second half is computed for nothing and dropped.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.out_channels = self.config["in_channels"]

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict for latents `x` (N, C, H, W) at times `t` (N,) in [0, 1] with labels `y` (N,): (N, C, H, W), in the dtype of `x`."""
        return super().forward(x, t, y)[:, : self.out_channels]  # (N, C, H, W)
