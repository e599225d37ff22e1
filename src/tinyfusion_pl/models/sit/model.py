"""SiT: scalable interpolant transformers (Ma et al., arXiv 2401.08740).

The network is DiT's, at continuous times in [0, 1]. Parameter names and layout are those of the
published checkpoints (willisma/SiT), which equal DiT's: the weights of one load into the other, and
only their training tells them apart.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tinyfusion_pl.models.dit import DiT


class SiT(DiT):
    """Interpolant transformer; see `DiT` for the arguments.

    With `learn_sigma`, as published, the final layer has twice the channels; the second half is
    dropped.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.out_channels = self.config["in_channels"]

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict the velocity.

        Args:
            x: Latents (N, C, H, W).
            t: Times (N,) in [0, 1].
            y: Labels (N,).

        Returns:
            (N, C, H, W), in the dtype of `x`.
        """
        return super().forward(x, t, y)[:, : self.out_channels]  # (N, C, H, W)
