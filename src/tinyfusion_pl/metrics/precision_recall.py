"""Improved precision and recall (Kynkäänniemi et al. 1904.06991)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tinyfusion_pl.metrics.base import RowsMetric
from tinyfusion_pl.metrics.features import Features
from tinyfusion_pl.metrics.functional import precision_recall
from tinyfusion_pl.metrics.functional.precision_recall import check_options


class PrecisionRecall(RowsMetric):
    """Keeps the features of reference and samples in float32.

    Args:
        num_features: Width of the features.
        k: Number of neighbors (published: 3).
        precision: ``"float32"``, ``"float64"`` or ``"adm_float16"``; see `precision_recall`.
        max_block_mib: Memory for distances at a time, in MiB.
        of: Tensor of `Features` that it reads.
        kwargs: Arguments of `FeatureMetric`.
    """

    higher_is_better = True
    SETTINGS = ("k", "precision")

    def __init__(
        self,
        num_features: int,
        *,
        k: int = 3,
        precision: str = "float32",
        max_block_mib: int = 256,
        of: str = "features",
        **kwargs: Any,
    ) -> None:
        super().__init__(of=of, num_features=num_features, **kwargs)
        check_options(k, precision, max_block_mib)
        self.k, self.precision, self.max_block_mib = k, precision, max_block_mib
        self.num_required = k + 1
        for side in ("reference", "samples"):
            self._add_rows(f"{side}_rows", num_features, torch.float32)

    def settings(self) -> dict[str, Any]:
        """Return k and precision, and the block size where a block falls back to float32."""
        blocks = {"max_block_mib": self.max_block_mib} if self.precision == "adm_float16" else {}
        return {**super().settings(), **blocks}

    def update(self, features: Features | Tensor, *, real: bool = False) -> None:
        """Add features (N, D) of generated images, or of the reference (`real`)."""
        rows = getattr(self, "reference_rows" if real else "samples_rows")
        rows.append(self._select_rows(features).float())

    def compute(self) -> dict[str, Tensor]:
        """Return ``precision`` and ``recall``, float64, 0 to 1."""
        precision, recall = precision_recall(
            self._join_rows("reference_rows"),
            self._join_rows("samples_rows"),
            self.k,
            self.precision,
            max_block_mib=self.max_block_mib,
        )
        return {"precision": precision, "recall": recall}
