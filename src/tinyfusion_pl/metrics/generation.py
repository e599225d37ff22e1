"""A collection of metrics that share one feature network, which runs once per batch of images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from tinyfusion_pl.artifacts import tensors_sha256
from tinyfusion_pl.metrics.base import FeatureMetric
from tinyfusion_pl.metrics.defaults import default_metrics
from tinyfusion_pl.metrics.features import FeatureNetwork, Features, check_images
from tinyfusion_pl.metrics.reference import Reference
from tinyfusion_pl.metrics.sample_numbers import SampleNumbers


class GenerationMetrics(nn.Module):
    """Metrics of generated images over one feature network.

    Sums are accumulated in float64 and reduced over all processes by `compute`, which every process
    must call. Each process adds its own share of the samples and of the reference. Results depend
    only on the images and their numbers, not on batches, processes, their order, or any random
    generator.

    Args:
        feature_network: Returns `Features`; frozen, and kept in evaluation mode and full precision.
        metrics: Name -> `FeatureMetric`, or None to leave one out. Default: ``fid``; ``sfid`` if
            the network has spatial features; ``inception_score`` and ``accuracy`` if it has logits
            (no accuracy if the network declares that they are never the classes of the data); and
            ``precision_recall``.

    Example:
        >>> from tinyfusion_pl.data import DigitsDataModule
        >>> from tinyfusion_pl.metrics import GenerationMetrics, load_digits_classifier
        >>> images, labels = DigitsDataModule().reference_images()
        >>> metrics = GenerationMetrics(load_digits_classifier())
        >>> metrics.update_reference(images[:900])
        >>> metrics.update(images[900:], labels[900:])
        >>> results = metrics.compute()
        >>> {name: round(results[name], 1) for name in ("fid", "sfid", "inception_score")}
        {'fid': 6.0, 'sfid': 3.0, 'inception_score': 9.9}
        >>> {name: round(results[name], 1) for name in ("precision", "recall", "accuracy")}
        {'precision': 0.8, 'recall': 0.8, 'accuracy': 1.0}
    """

    feature_network: FeatureNetwork

    def __init__(
        self,
        feature_network: FeatureNetwork,
        *,
        metrics: Mapping[str, FeatureMetric | None] | None = None,
    ) -> None:
        super().__init__()
        self.feature_network = feature_network
        given = default_metrics(feature_network) if metrics is None else metrics
        chosen = {name: metric for name, metric in given.items() if metric is not None}
        if not chosen:
            raise ValueError(
                "metrics is empty. Give at least one metric, or null for the defaults of the "
                "feature network."
            )
        _check_widths(chosen, feature_network)
        for metric in chosen.values():
            metric.reset_real_features = False
        self.names = list(chosen)
        self.collection = MetricCollection(
            cast(dict[str, Metric | MetricCollection], chosen), compute_groups=False
        )
        self.samples = SampleNumbers()
        self.num_samples = 0
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> GenerationMetrics:
        """Stay in evaluation mode, also within a module that is training."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        """Device of the metric states."""
        return self.samples.device

    @property
    def needs_reference_features(self) -> bool:
        """Whether a metric needs the features of each reference image rather than statistics."""
        return any(metric.keeps_rows and metric.needs_reference for metric in self._metrics())

    def features(self, images: Tensor) -> Features:
        """Return the `Features` of images, uint8 (N, C, H, W)."""
        check_images(images)
        images = images.to(self.device)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            features, logits, spatial = Features(*self.feature_network(images))
            return Features(
                features.float(),
                None if logits is None else logits.float(),
                None if spatial is None else spatial.float(),
            )

    def update(
        self, images: Tensor, labels: Tensor | None = None, *, indices: Tensor | None = None
    ) -> None:
        """Add generated images.

        Args:
            images: uint8 (N, C, H, W).
            labels: The classes (N,) they were generated for. Leave them out if the logits of the
                network are not the classes of the data; there is no accuracy then.
            indices: Their numbers (N,) among all samples. Default: in order of arrival, in one
                process only.
        """
        self.update_features(self.features(images), labels, indices=indices)

    def update_features(
        self, features: Features, labels: Tensor | None = None, *, indices: Tensor | None = None
    ) -> None:
        """Add generated images, as `update` does, by their `features`."""
        num = len(features.features)
        if indices is None:
            indices = self.samples.next(num)
        elif indices.shape != (num,):
            raise ValueError(
                f"{num} images need indices of shape ({num},), got {tuple(indices.shape)}."
            )
        if labels is not None:
            for metric in self._metrics():
                metric.check_labels(labels, num)  # before anything is counted
        self.collection.update(
            features, labels=labels, indices=indices.to(features.features.device), real=False
        )
        self.samples.update(indices)

    def update_reference(self, images: Tensor) -> None:
        """Add reference images, uint8 (N, C, H, W)."""
        self.update_reference_features(self.features(images))

    def update_reference_features(self, features: Features) -> None:
        """Add reference images, as `update_reference` does, by their `features`."""
        for metric in self._metrics():
            metric.update(features, real=True)

    def set_reference(
        self, reference: Reference, *, rank: int = 0, world_size: int = 1, batch_size: int = 64
    ) -> None:
        """Use the statistics, features or images of a file; `rank` of `world_size` takes its share.

        Raises:
            ValueError: if another feature network made the file, or it lacks what a metric needs.
        """
        self.check_reference(reference)
        self.reset(reference=True)
        need_images = [
            metric
            for metric in self._metrics()
            if not metric.load_reference(reference, rank=rank, world_size=world_size)
        ]
        if need_images:
            assert reference.images is not None  # check_reference
            for batch in reference.images[rank::world_size].split(batch_size):
                features = self.features(batch)
                for metric in need_images:
                    metric.update(features, real=True)

    def reference_state(self) -> dict[str, Tensor]:
        """Return this process's state of the reference, ``<metric>.<state>`` -> tensor."""
        return {
            f"{name}.{key}": x
            for name, metric in self._items()
            for key, x in metric.reference_state().items()
        }

    def load_reference_state(self, state: Mapping[str, Tensor]) -> None:
        """Load the `reference_state` of the same metrics in place of reference images."""
        self.reset(reference=True)
        for name, metric in self._items():
            prefix = f"{name}."
            metric.load_reference_state(
                {key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)}
            )

    def check_reference(self, reference: Reference) -> None:
        """Check, without computing anything, that every metric can use a reference.

        Raises:
            ValueError: if another feature network made the file, or it lacks what a metric needs.
        """
        if reference.network and reference.network != self.fingerprint():
            raise ValueError(
                f"{reference.path} was made with the feature network {reference.network}, but "
                f"this one is {self.fingerprint()}. Make it again with this network "
                "(task=reference), or choose the metrics that it was made with."
            )
        for name, metric in self._items():
            if not metric.check_reference(reference) and reference.images is None:
                raise ValueError(
                    f"{reference.path} holds {reference.contents()}, but {name!r} needs images "
                    "(arr_0). Leave that metric out, or make a reference from images "
                    "(task=reference)."
                )

    def check(self, *, num_samples: int, num_reference: int | None = None) -> None:
        """Raise `ValueError`, before sampling, if a metric needs more images than there will be."""
        for name, metric in self._items():
            for kind, num in (
                ("samples", num_samples),
                ("reference images", num_reference if metric.needs_reference else None),
            ):
                if num is not None and num < metric.num_required:
                    raise ValueError(
                        f"{name!r} needs {metric.num_required} or more {kind}, got {num}."
                    )

    def compute(self) -> dict[str, float]:
        """Return the value of each metric, in the order in which the metrics were given.

        Distances are best at 0, the Inception score ranges from 1 to the number of classes, and
        precision, recall and accuracy from 0 to 1.
        """
        numbers = self.samples.compute()
        self.num_samples = numbers.numel()  # torchmetrics squeezes a single one
        results: dict[str, float] = {}
        for name in self.names:  # a collection sorts them
            value = self._metric(name).compute()
            values = value if isinstance(value, dict) else {name: value}
            results |= {key: x.item() for key, x in values.items()}
        return results

    def reset(self, *, reference: bool = False) -> None:
        """Clear the generated images, and with `reference` the reference too."""
        for metric in self._metrics():
            metric.reset_real_features = reference
            metric.reset()
            metric.reset_real_features = False
        self.samples.reset()

    def statistics(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return this process's reference statistics, tensor of `Features` -> mean, covariance."""
        found = [(metric.of, metric.reference_statistics()) for metric in self._metrics()]
        return {of: statistics for of, statistics in found if statistics is not None}

    def settings(self) -> dict[str, dict[str, Any]]:
        """Return the options that determine each metric, by name."""
        metrics = {name: self._metric(name) for name in self.names}
        return {
            name: {"metric": type(metric).__name__, **metric.settings()}
            for name, metric in metrics.items()
        }

    def protocol(self, **made: Any) -> dict[str, Any]:
        """Return what two results must share to be comparable.

        Args:
            made: How the images were made; added to the feature network and `settings`.
        """
        return {**made, "feature_network": self.fingerprint(), "metrics": self.settings()}

    def fingerprint(self) -> str:
        """Return name and shortened SHA-256 (weights and preprocessing) of the feature network."""
        network = self.feature_network
        name = getattr(network, "name", type(network).__name__)
        if not isinstance(network, nn.Module):
            return name
        preprocessing = str(getattr(network, "preprocessing", ""))
        return f"{name}-{tensors_sha256(network.state_dict(), preface=preprocessing)[:12]}"

    def _metric(self, name: str) -> FeatureMetric:
        return cast(FeatureMetric, self.collection[name])

    def _items(self) -> list[tuple[str, FeatureMetric]]:
        return cast(list[tuple[str, FeatureMetric]], list(self.collection.items()))

    def _metrics(self) -> list[FeatureMetric]:
        return [metric for _, metric in self._items()]


def _check_widths(metrics: Mapping[str, Any], network: FeatureNetwork) -> None:
    widths = {
        "features": getattr(network, "num_features", None),
        "logits": getattr(network, "num_classes", None),
        "spatial": getattr(network, "num_spatial", None),
    }
    for name, metric in metrics.items():
        if not isinstance(metric, FeatureMetric):
            raise ValueError(
                f"metrics.{name} is of type {type(metric).__name__}; give a FeatureMetric."
            )
        if (width := widths[metric.of]) != metric.num_features:
            there = f"returns {width}" if width else "returns none"
            raise ValueError(
                f"metrics.{name} expects {metric.num_features} {metric.of}, but the feature "
                f"network {there}."
            )
