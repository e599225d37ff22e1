"""How good generated images are: one run of the feature network a batch, and every metric over what it said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from tinyfusion_pl.artifacts import tensors_sha256
from tinyfusion_pl.metrics.accuracy import LabelAccuracy
from tinyfusion_pl.metrics.base import FeatureMetric, RowsMetric
from tinyfusion_pl.metrics.features import FeatureNetwork, Features, check_images
from tinyfusion_pl.metrics.frechet import FrechetDistance
from tinyfusion_pl.metrics.inception_score import InceptionScore
from tinyfusion_pl.metrics.precision_recall import PrecisionRecall
from tinyfusion_pl.metrics.reference import Reference


class GenerationMetrics(nn.Module):
    """Metrics of images over one feature network.

    Sums are kept in float64 and added up over all processes when `compute` is called, which every process must do; each process gives its
    own share of the images, of the reference too. Results depend on the images and their numbers alone: not on batches, processes,
    their order, or any random generator.

    Args:
        feature_network: Gives `Features`; frozen here, and kept in evaluation mode and full precision.
        metrics: Name -> metric of `Features`, None to leave one out; default: ``fid``, ``sfid`` where there are spatial features,
            ``inception_score`` and ``accuracy`` where there are logits (accuracy unless the network says that they are
            never the data's classes), and ``precision_recall``.

    Example:
        >>> from tinyfusion_pl.data import DigitsDataModule
        >>> from tinyfusion_pl.metrics import GenerationMetrics, load_digits_classifier
        >>> images, labels = DigitsDataModule().reference_images()
        >>> metrics = GenerationMetrics(load_digits_classifier())
        >>> metrics.update_reference(images[:900])
        >>> metrics.update(images[900:], labels[900:])
        >>> {name: round(value, 1) for name, value in metrics.compute().items()}
        {'fid': 6.0, 'sfid': 3.0, 'inception_score': 9.9, 'precision': 0.8, 'recall': 0.8, 'accuracy': 1.0}
    """

    def __init__(
        self,
        feature_network: FeatureNetwork,
        *,
        metrics: Mapping[str, FeatureMetric | None] | None = None,
    ) -> None:
        super().__init__()
        self.feature_network = feature_network
        metrics = dict(default_metrics(feature_network) if metrics is None else metrics)
        metrics = {name: metric for name, metric in metrics.items() if metric is not None}
        if not metrics:
            raise ValueError(
                "metrics is empty; give at least one, or null for all that the feature network allows."
            )
        _check_widths(metrics, feature_network)
        for metric in metrics.values():
            metric.reset_real_features = False
        self.names = list(metrics)
        self.collection = MetricCollection(metrics, compute_groups=False)
        self.samples = _Samples()
        self.num_samples = 0
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> GenerationMetrics:
        """Stays in evaluation mode, also as a part of a module that trains."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        return self.samples.device

    def features(self, images: Tensor) -> Features:
        """What the feature network says of images, uint8 (N, C, H, W)."""
        check_images(images)
        images = images.to(self.device)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return Features(*(x if x is None else x.float() for x in self.feature_network(images)))

    def update(
        self, images: Tensor, labels: Tensor | None = None, *, indices: Tensor | None = None
    ) -> None:
        """Add generated images, uint8 (N, C, H, W), the classes (N,) they were asked to be, and their numbers (N,) among all samples.

        Leave `labels` out where the network's logits are not the classes of the data: there is no accuracy then. Without `indices`,
        images are numbered as they come, which one process alone may do.
        """
        self.update_features(self.features(images), labels, indices=indices)

    def update_features(
        self, features: Features, labels: Tensor | None = None, *, indices: Tensor | None = None
    ) -> None:
        """As `update`, of what `features` said of the images."""
        num = len(features.features)
        if indices is None:
            indices = self.samples.next(num)
        elif indices.shape != (num,):
            raise ValueError(
                f"{num} images need numbers of shape ({num},); these are {tuple(indices.shape)}."
            )
        for metric in self.collection.values():
            if labels is not None and isinstance(metric, LabelAccuracy):
                metric.check_labels(labels, num)  # before anything is counted
        self.collection.update(
            features, labels=labels, indices=indices.to(features.features.device), real=False
        )
        self.samples.update(indices)

    def update_reference(self, images: Tensor) -> None:
        """Add real images, uint8 (N, C, H, W), to what generated ones are held against."""
        self.update_reference_features(self.features(images))

    def update_reference_features(self, features: Features) -> None:
        """As `update_reference`, of what `features` said of the images."""
        for metric in self.collection.values():
            metric.update(features, real=True)

    def set_reference(
        self, reference: Reference, *, rank: int = 0, world_size: int = 1, batch_size: int = 64
    ) -> None:
        """Hold samples against a file's statistics, features or images; process `rank` of `world_size` takes its share.

        Raises:
            ValueError: when the file was made with another feature network, or lacks what a metric needs.
        """
        self.check_reference(reference)
        self.reset(reference=True)
        need_images = []
        for metric in self.collection.values():
            if isinstance(metric, FrechetDistance) and metric.of in reference.statistics:
                metric.set_reference(*reference.statistics[metric.of])
            elif reference.features is not None and metric.of == "features":
                metric.update(reference.features[rank::world_size].to(self.device), real=True)
            elif metric.needs_reference:
                need_images.append(metric)
        if need_images:
            for batch in reference.images[rank::world_size].split(batch_size):
                features = self.features(batch)
                for metric in need_images:
                    metric.update(features, real=True)

    def reference_state(self) -> dict[str, Tensor]:
        """What this process knows of the reference's images, ``<metric>.<state>`` -> tensor, for `load_reference_state`."""
        state = {}
        for name, metric in self.collection.items():
            for key in (key for key in metric._defaults if key.startswith("reference_")):
                value = getattr(metric, key)
                state[f"{name}.{key}"] = metric._joined(key) if isinstance(value, list) else value
        return state

    def load_reference_state(self, state: Mapping[str, Tensor]) -> None:
        """Take what `reference_state` of the same metrics gave, in place of the reference's images."""
        self.reset(reference=True)
        for name, metric in self.collection.items():
            for key in (key for key in metric._defaults if key.startswith("reference_")):
                value = state[f"{name}.{key}"].to(self.device)
                setattr(metric, key, [value] if isinstance(getattr(metric, key), list) else value)
                metric._update_count += 1  # torchmetrics warns where a metric was never updated

    def check_reference(self, reference: Reference) -> None:
        """`ValueError` when a file was made with another feature network, or lacks what a metric needs: nothing is computed."""
        if reference.network and reference.network != self.fingerprint():
            raise ValueError(
                f"{reference.path} was made with the feature network {reference.network}; this is {self.fingerprint()}. Make "
                "it anew with this one (task=reference), or choose the metrics that it was made with."
            )
        for name, metric in self.collection.items():
            given = isinstance(metric, FrechetDistance) and metric.of in reference.statistics
            if given:
                metric.check_statistics(*reference.statistics[metric.of])
            elif reference.features is not None and metric.of == "features":
                if reference.features.shape[1] != metric.num_features:
                    raise ValueError(
                        f"{reference.path} holds {reference.features.shape[1]} features of each image; this feature network "
                        f"gives {metric.num_features}. Make it anew with this one (task=reference)."
                    )
            elif reference.images is None and metric.needs_reference:
                raise ValueError(
                    f"{reference.path} holds {reference.contents()}: not enough for {name!r}, which needs images (arr_0). "
                    "Leave that metric out, or make a reference from images (task=reference)."
                )

    def check(self, *, num_samples: int, num_reference: int | None = None) -> None:
        """`ValueError` where a metric cannot be had of so many images: before they are made."""
        for name, metric in self.collection.items():
            for kind, num in (
                ("samples", num_samples),
                ("reference images", num_reference if metric.needs_reference else None),
            ):
                if num is not None and num < metric.num_required:
                    raise ValueError(
                        f"{name!r} needs {metric.num_required} or more {kind}; there are {num}."
                    )

    def compute(self) -> dict[str, float]:
        """Each metric's number (0 is best for distances; the score goes from 1 to the number of classes; shares from 0 to 1)."""
        numbers = self.samples.compute()
        self.num_samples = numbers.numel()  # torchmetrics squeezes a single one
        results: dict[str, float] = {}
        for name in self.names:  # a collection sorts them
            value = self.collection[name].compute()
            results |= {
                key: x.item()
                for key, x in (value if isinstance(value, dict) else {name: value}).items()
            }
        return results

    def reset(self, *, reference: bool = False) -> None:
        """Forget the generated images, and with `reference` the real ones too."""
        for metric in self.collection.values():
            metric.reset_real_features = reference
            metric.reset()
            metric.reset_real_features = False
        self.samples.reset()

    def statistics(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean and covariance of the reference on this process: ``{"features": (mu, sigma), "spatial": ...}``."""
        return {
            metric.of: metric.statistics()
            for metric in self.collection.values()
            if isinstance(metric, FrechetDistance)
        }

    def settings(self) -> dict[str, dict[str, Any]]:
        """Name -> what decides its number beside the images: for the protocol of a result."""
        return {
            name: {
                "metric": type(self.collection[name]).__name__,
                **self.collection[name].settings(),
            }
            for name in self.names
        }

    def protocol(self, **made: Any) -> dict[str, Any]:
        """What two results must share to be comparable: how the images were `made`, the feature network, each metric's settings."""
        return {**made, "feature_network": self.fingerprint(), "metrics": self.settings()}

    def fingerprint(self) -> str:
        """The feature network's name and the beginning of the SHA-256 of its weights and preprocessing: what a reference carries."""
        name = getattr(self.feature_network, "name", type(self.feature_network).__name__)
        if not isinstance(self.feature_network, nn.Module):
            return name
        preprocessing = str(getattr(self.feature_network, "preprocessing", ""))
        return f"{name}-{tensors_sha256(self.feature_network.state_dict(), preface=preprocessing)[:12]}"


def default_metrics(network: FeatureNetwork) -> dict[str, FeatureMetric]:
    """All that a feature network allows."""
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


class _Samples(RowsMetric):
    """The numbers of the samples seen: each once, over all processes."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(of="features", num_features=1, **kwargs)
        self._add_rows("numbers", 1, torch.long)

    def next(self, num: int) -> Tensor:
        if (
            torch.distributed.is_available()
            and torch.distributed.is_initialized()
            and torch.distributed.get_world_size() > 1
        ):
            raise ValueError(
                "Several processes share the samples: give their numbers, update(images, labels, indices=...)."
            )
        return torch.arange(num) + sum(len(rows) for rows in self.numbers)

    def update(self, indices: Tensor) -> None:
        self.numbers.append(indices.detach().to(self.device).long().unsqueeze(1))

    def compute(self) -> Tensor:
        numbers, counts = self._joined("numbers")[:, 0].unique(return_counts=True)
        if (twice := numbers[counts > 1]).numel():
            raise ValueError(
                f"{len(twice)} samples were measured more than once (numbers {twice[:8].tolist()}): the sampler pads its last "
                "batch, or two processes got the same share. Give every sample to one process."
            )
        return numbers


def _check_widths(metrics: Mapping[str, Metric], network: FeatureNetwork) -> None:
    widths = {
        of: getattr(network, name, None)
        for of, name in {
            "features": "num_features",
            "logits": "num_classes",
            "spatial": "num_spatial",
        }.items()
    }
    for name, metric in metrics.items():
        if not isinstance(metric, FeatureMetric):
            raise ValueError(
                f"metrics.{name} is a {type(metric).__name__}; give one of this package's metrics of features."
            )
        if (width := widths[metric.of]) != metric.num_features:
            there = f"has {width} of them" if width else "gives none"
            raise ValueError(
                f"metrics.{name} looks at {metric.num_features} {metric.of}, but the feature network {there}."
            )
