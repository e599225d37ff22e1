"""Inception score over consecutive blocks of samples (Salimans et al. 1606.03498; blocks as in the ADM evaluator)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tinyfusion_pl.metrics.base import RowsMetric
from tinyfusion_pl.metrics.features import Features
from tinyfusion_pl.metrics.functional.inception_score import add_blocks, block_sums, score_of_blocks


class InceptionScore(RowsMetric):
    """Accumulates one row of sums for each block of `block_size` samples; no logits are kept, nothing is shuffled.

    Args:
        num_classes: Width of the logits, which should be bias-free ones.
        block_size: Published: 5000. Blocks are of the samples' numbers, not of the order in which they arrive.
        kwargs: See `FeatureMetric`.
    """

    higher_is_better = True
    needs_reference = False
    SETTINGS = ("block_size",)

    def __init__(
        self, num_classes: int, *, block_size: int = 5000, of: str = "logits", **kwargs: Any
    ) -> None:
        super().__init__(of=of, num_features=num_classes, **kwargs)
        if block_size < 1:
            raise ValueError(f"block_size is {block_size}; give at least 1 (published: 5000).")
        self.block_size = block_size
        self._add_rows("blocks", 3 + num_classes, torch.float64)
        self.add_state("arrived", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(
        self, logits: Features | Tensor, *, indices: Tensor | None = None, real: bool = False
    ) -> None:
        """Add logits (N, classes) of the samples with numbers `indices` (N,); default: they follow those that came before.

        Raises:
            ValueError: without `indices` where several processes share the samples: which come first is then unknown.
        """
        if real:
            return
        x = self._rows(logits)
        if indices is None:
            if (
                torch.distributed.is_available()
                and torch.distributed.is_initialized()
                and torch.distributed.get_world_size() > 1
            ):
                raise ValueError(
                    "Several processes share the samples: give their numbers, update(logits, indices=...)."
                )
            indices = self.arrived + torch.arange(len(x), device=x.device)
        self.arrived = self.arrived + len(x)
        rows = torch.cat([self._joined("blocks"), block_sums(x, indices, self.block_size)])
        self.blocks = [add_blocks(rows[:, 0].long(), rows[:, 1:])]

    def compute(self) -> Tensor:
        """The score, float64, 1 to the number of classes."""
        rows = self._joined("blocks")
        if not len(rows):
            raise ValueError(
                "An Inception score needs generated images and has none: call update(logits) first."
            )
        return score_of_blocks(add_blocks(rows[:, 0].long(), rows[:, 1:]))
