"""The metrics that `GenerationMetrics` computes by default."""

from __future__ import annotations

from tinyfusion_pl.metrics.accuracy import LabelAccuracy
from tinyfusion_pl.metrics.base import FeatureMetric
from tinyfusion_pl.metrics.features import FeatureNetwork
from tinyfusion_pl.metrics.frechet import FrechetDistance
from tinyfusion_pl.metrics.inception_score import InceptionScore
from tinyfusion_pl.metrics.precision_recall import PrecisionRecall


def default_metrics(network: FeatureNetwork) -> dict[str, FeatureMetric]:
    """Return every default metric that the outputs of `network` allow, by name."""
    metrics: dict[str, FeatureMetric] = {"fid": FrechetDistance(network.num_features)}
    if num_spatial := getattr(network, "num_spatial", None):
        metrics["sfid"] = FrechetDistance(num_spatial, of="spatial")
    num_classes = getattr(network, "num_classes", None)
    if num_classes:
        metrics["inception_score"] = InceptionScore(num_classes)
    metrics["precision_recall"] = PrecisionRecall(network.num_features)
    if num_classes and getattr(network, "logits_are_classes", True):
        metrics["accuracy"] = LabelAccuracy(num_classes)
    return metrics
