"""Counts which samples were measured, over all processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tinyfusion_pl.metrics.base import RowsMetric, has_several_processes


class SampleNumbers(RowsMetric):
    """The numbers of the samples measured so far; each may occur once over all processes."""

    numbers: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(of="features", num_features=1, **kwargs)
        self._add_rows("numbers", 1, torch.long)

    def next(self, num: int) -> Tensor:
        """Return the `num` numbers (num,) that follow those measured so far, in one process."""
        if has_several_processes():
            raise ValueError(
                "Several processes share the samples, so their numbers are required: call "
                "update(images, labels, indices=...)."
            )
        return torch.arange(num) + sum(len(rows) for rows in self.numbers)

    def update(self, indices: Tensor) -> None:
        """Add the numbers `indices` (N,)."""
        self.numbers.append(indices.detach().to(self.device).long().unsqueeze(1))

    def compute(self) -> Tensor:
        """Return the numbers in ascending order, int64.

        Raises:
            ValueError: if a sample was measured more than once.
        """
        numbers, counts = self._join_rows("numbers")[:, 0].unique(return_counts=True)
        if (twice := numbers[counts > 1]).numel():
            raise ValueError(
                f"{len(twice)} samples were measured more than once (numbers "
                f"{twice[:8].tolist()}): the data loader pads its last batch, or two processes "
                "have the same share. Give each sample to one process."
            )
        return numbers
