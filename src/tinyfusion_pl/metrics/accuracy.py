"""How often a classifier names generated images as the classes they were asked to be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tinyfusion_pl.metrics.base import FeatureMetric
from tinyfusion_pl.metrics.features import Features


class LabelAccuracy(FeatureMetric):
    """The share of images whose largest logit is their label; images without labels give no accuracy.

    Args:
        num_classes: Width of the logits.
        kwargs: See `FeatureMetric`.
    """

    higher_is_better = True
    needs_reference = False

    def __init__(self, num_classes: int, *, of: str = "logits", **kwargs: Any) -> None:
        super().__init__(of=of, num_features=num_classes, **kwargs)
        for name in ("right", "labelled", "seen"):
            self.add_state(name, torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(
        self, logits: Features | Tensor, labels: Tensor | None = None, *, real: bool = False
    ) -> None:
        """Add logits (N, classes) of images that should be `labels` (N,)."""
        if real:
            return
        x = self._rows(logits)
        if labels is not None:
            labels = labels.to(x.device)
            self.check_labels(labels, len(x))
            self.right = self.right + (x.argmax(1) == labels).sum()
            self.labelled = self.labelled + len(x)
        self.seen = self.seen + len(x)

    def check_labels(self, labels: Tensor, num: int) -> None:
        """`ValueError` unless `labels` are `num` classes of the network."""
        if labels.shape != (num,):
            raise ValueError(
                f"{num} images need labels of shape ({num},); these are {tuple(labels.shape)}."
            )
        if num and not 0 <= labels.min() <= labels.max() < self.num_features:
            raise ValueError(
                f"Labels go from {labels.min()} to {labels.max()}, but the feature network names classes 0 to {self.num_features - 1}. "
                "Where its classes are not those of the data, leave the labels out."
            )

    def compute(self) -> dict[str, Tensor]:
        """``accuracy``, float64, 0 to 1; nothing where no image had a label."""
        right, labelled, seen = (int(x) for x in (self.right, self.labelled, self.seen))
        if labelled not in (0, seen):
            raise ValueError(
                f"{labelled} of {seen} generated images have labels. Give labels with all or with none."
            )
        return {"accuracy": self.right.double() / labelled} if labelled else {}
