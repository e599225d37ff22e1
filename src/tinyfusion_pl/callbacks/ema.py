"""Exponential moving average of weights with a warm-up, on Lightning's own weight averaging."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import WeightAveraging
from torch.optim.swa_utils import get_ema_multi_avg_fn


def warmed_up_decay(decay: float, num_updates: int) -> float:
    """min(decay, (1 + n) / (10 + n)): the first updates forget the initial weights quickly (as in TensorFlow's and timm's EMA)."""
    return min(decay, (1 + num_updates) / (10 + num_updates))


def scaled_decay(decay: float, *, batch_size: int, reference_batch_size: int) -> float:
    """The decay that keeps the half-life in images when the batch is another: decay ** (batch_size / reference_batch_size)."""
    return decay ** (batch_size / reference_batch_size)


class EMAWithWarmup(WeightAveraging):
    """Lightning's weight averaging with an exponential average, its decay warmed up, buffers copied instead of averaged.

    Args:
        decay: Decay once warmed up, in [0, 1) (published: 0.9999).
        batch_size: Images of an optimizer step, all devices together; None: `decay` holds as it is.
        reference_batch_size: Batch that `decay` was chosen for (published: 256), see `scaled_decay`.
    """

    def __init__(self, *, decay: float = 0.9999, batch_size: int | None = None, reference_batch_size: int = 256) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"The EMA decay is {decay}; give a number in [0, 1) (published: 0.9999).")
        if (batch_size is not None and batch_size < 1) or reference_batch_size < 1:
            raise ValueError(f"The EMA's batch_size is {batch_size} and its reference_batch_size {reference_batch_size}; give counts >= 1.")
        if batch_size is not None:
            decay = scaled_decay(decay, batch_size=batch_size, reference_batch_size=reference_batch_size)
        self.decay = decay
        super().__init__(use_buffers=False, multi_avg_fn=self._average)

    def _average(self, averaged: Any, current: Any, num_averaged: Any) -> None:
        get_ema_multi_avg_fn(warmed_up_decay(self.decay, int(num_averaged)))(averaged, current, num_averaged)
