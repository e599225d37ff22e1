"""Inception score over blocks of consecutive samples (Salimans et al. 1606.03498).

The blocks are those of the ADM evaluator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tinyfusion_pl.metrics.base import RowsMetric, has_several_processes
from tinyfusion_pl.metrics.features import Features
from tinyfusion_pl.metrics.functional.inception_score import add_blocks, block_sums, score_of_blocks


class InceptionScore(RowsMetric):
    """Accumulates one row of sums per block of `block_size` samples; keeps no logits.

    Args:
        num_classes: Width of the logits, which should have no bias.
        block_size: Samples per block (published: 5000), by sample number, not order of arrival.
        of: Tensor of `Features` that holds the logits.
        kwargs: Arguments of `FeatureMetric`.
    """

    higher_is_better = True
    needs_reference = False
    SETTINGS = ("block_size",)
    num_samples: Tensor

    def __init__(
        self, num_classes: int, *, block_size: int = 5000, of: str = "logits", **kwargs: Any
    ) -> None:
        super().__init__(of=of, num_features=num_classes, **kwargs)
        if block_size < 1:
            raise ValueError(f"block_size is {block_size}; give at least 1 (published: 5000).")
        self.block_size = block_size
        self._add_rows("blocks", 3 + num_classes, torch.float64)
        self.add_state("num_samples", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(
        self, logits: Features | Tensor, *, indices: Tensor | None = None, real: bool = False
    ) -> None:
        """Add logits of generated images; logits of reference images are ignored.

        Args:
            logits: `Features`, or the logits (N, classes).
            indices: Numbers (N,) of the samples; default: they follow the samples before.
            real: Whether the images are reference images.

        Raises:
            ValueError: without `indices` if several processes share the samples: their order is
                then unknown.
        """
        if real:
            return
        x = self._select_rows(logits)
        if indices is None:
            if has_several_processes():
                raise ValueError(
                    "Several processes share the samples, so their numbers are required: call "
                    "update(logits, indices=...)."
                )
            indices = self.num_samples + torch.arange(len(x), device=x.device)
        self.num_samples = self.num_samples + len(x)
        rows = torch.cat([self._join_rows("blocks"), block_sums(x, indices, self.block_size)])
        self.blocks = [add_blocks(rows[:, 0].long(), rows[:, 1:])]

    def compute(self) -> Tensor:
        """Return the score, float64, 1 to the number of classes."""
        rows = self._join_rows("blocks")
        if not len(rows):
            raise ValueError(
                "An Inception score needs generated images and has none: call update(logits) first."
            )
        return score_of_blocks(add_blocks(rows[:, 0].long(), rows[:, 1:]))
