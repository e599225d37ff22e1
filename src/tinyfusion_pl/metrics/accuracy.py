"""Accuracy of a classifier on generated images, against the classes they were generated for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tinyfusion_pl.metrics.base import FeatureMetric
from tinyfusion_pl.metrics.features import Features


class LabelAccuracy(FeatureMetric):
    """The share of images whose largest logit is their label; no accuracy without labels.

    Args:
        num_classes: Width of the logits.
        of: Tensor of `Features` that holds the logits.
        kwargs: Arguments of `FeatureMetric`.
    """

    higher_is_better = True
    needs_reference = False
    num_correct: Tensor
    num_labeled: Tensor
    num_images: Tensor

    def __init__(self, num_classes: int, *, of: str = "logits", **kwargs: Any) -> None:
        super().__init__(of=of, num_features=num_classes, **kwargs)
        for name in ("num_correct", "num_labeled", "num_images"):
            self.add_state(name, torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(
        self, logits: Features | Tensor, labels: Tensor | None = None, *, real: bool = False
    ) -> None:
        """Add logits (N, classes) of images that were generated for `labels` (N,)."""
        if real:
            return
        x = self._select_rows(logits)
        if labels is not None:
            labels = labels.to(x.device)
            self.check_labels(labels, len(x))
            self.num_correct = self.num_correct + (x.argmax(1) == labels).sum()
            self.num_labeled = self.num_labeled + len(x)
        self.num_images = self.num_images + len(x)

    def check_labels(self, labels: Tensor, num: int) -> None:
        """Raise `ValueError` unless `labels` are classes of the network, one for each image."""
        if labels.shape != (num,):
            raise ValueError(
                f"{num} images need labels of shape ({num},), got {tuple(labels.shape)}."
            )
        if num and not 0 <= labels.min() <= labels.max() < self.num_features:
            raise ValueError(
                f"Labels range from {labels.min()} to {labels.max()}, but the feature network has "
                f"classes 0 to {self.num_features - 1}. Leave the labels out if its classes are "
                "not the classes of the data."
            )

    def compute(self) -> dict[str, Tensor]:
        """Return ``accuracy``, float64, 0 to 1; an empty dictionary without labels."""
        num_labeled, num_images = int(self.num_labeled), int(self.num_images)
        if num_labeled not in (0, num_images):
            raise ValueError(
                f"{num_labeled} of {num_images} generated images have labels. Give labels for all "
                "images or for none."
            )
        return {"accuracy": self.num_correct.double() / num_labeled} if num_labeled else {}
