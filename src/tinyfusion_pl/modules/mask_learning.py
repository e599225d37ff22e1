"""Mask learning (TinyFusion, sections 3.2 and 3.3): the denoiser trains while its gates learn which blocks matter."""

from __future__ import annotations

from tinyfusion_pl.modules.denoising import Denoising
from tinyfusion_pl.pruning import find_gates


class MaskLearning(Denoising):
    """Trains a denoiser whose blocks carry gates; the gates come from `DepthPruningCallback` in the Trainer.

    See `Denoising` for the arguments. Published: AdamW 1e-4 without weight decay.
    """

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if find_gates(self.denoiser) is None:
            raise ValueError("The denoiser carries no gates, so there is no mask to learn. Add DepthPruningCallback(pattern) to the "
                             "Trainer's callbacks.")
