"""Base classes of the metrics: each accumulates feature network outputs over batches and processes.

A new metric is one file with a subclass of `FeatureMetric`; see `docs/how_to/add_a_metric.md`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from tinyfusion_pl.metrics.features import Features
from tinyfusion_pl.metrics.reference import Reference


class FeatureMetric(Metric):
    """A metric of `Features`, or of one of their tensors.

    A subclass implements ``update(features, *, real=False)`` and ``compute()``. ``update`` may
    also take ``labels`` (N,) and ``indices`` (N,), the numbers of the samples: `GenerationMetrics`
    passes what the signature names. ``compute`` returns a tensor, or a dictionary of name to
    tensor. States of the reference images have names that start with ``reference_``: they survive
    ``reset()`` within `GenerationMetrics`, and are shared between runs. Class attributes describe
    the metric:

    - ``num_required``: Minimum number of images on each side.
    - ``needs_reference``: Whether the metric compares with reference images.
    - ``keeps_rows``: Whether it needs the features of each image rather than sums.
    - ``SETTINGS``: Names of the attributes that determine its value; they go into the protocol.

    Args:
        of: The tensor of `Features` that it reads: ``"features"``, ``"spatial"`` or ``"logits"``.
        num_features: Width of that tensor.
        reset_real_features: Whether ``reset()`` also clears the reference, as in torchmetrics.
        kwargs: Arguments of `torchmetrics.Metric` (``sync_on_compute``, ...).
    """

    is_differentiable = False
    full_state_update = False
    num_required: int = 1
    needs_reference: bool = True
    keeps_rows: bool = False
    SETTINGS: tuple[str, ...] = ()

    def __init__(
        self, *, of: str, num_features: int, reset_real_features: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if of not in Features._fields:
            raise ValueError(f"of is {of!r}; give one of {', '.join(map(repr, Features._fields))}.")
        if num_features < 1:
            raise ValueError(f"num_features is {num_features}; give at least 1.")
        self.of, self.num_features, self.reset_real_features = of, num_features, reset_real_features

    def settings(self) -> dict[str, Any]:
        """Return the options that determine the value, for the protocol of a result."""
        return {"of": self.of, **{name: getattr(self, name) for name in self.SETTINGS}}

    def check_labels(self, labels: Tensor, num: int) -> None:
        """Raise `ValueError` if the metric cannot use `labels` of `num` images; default: accept."""

    def check_reference(self, reference: Reference) -> bool:
        """Return whether the metric can use `reference` without its images.

        Raises:
            ValueError: if its contents have another width than this metric.
        """
        if reference.features is None or self.of != "features":
            return not self.needs_reference
        if reference.features.shape[1] != self.num_features:
            raise ValueError(
                f"{reference.path} holds {reference.features.shape[1]} features per image, but "
                f"this feature network has {self.num_features}. Make the reference again with "
                "this network (task=reference)."
            )
        return True

    def load_reference(self, reference: Reference, *, rank: int = 0, world_size: int = 1) -> bool:
        """Take what `reference` holds besides images; return whether that is enough.

        Process `rank` of `world_size` takes its share of the rows.
        """
        if not self.check_reference(reference):
            return False
        if reference.features is not None and self.of == "features":
            self.update(reference.features[rank::world_size].to(self.device), real=True)
        return True

    def reference_statistics(self) -> tuple[Tensor, Tensor] | None:
        """Return mean and covariance of the reference, or None if the metric has none."""
        return None

    def reference_state(self) -> dict[str, Tensor]:
        """Return the state of the reference images on this process, name to tensor."""
        return {name: getattr(self, name) for name in self._reference_names()}

    def load_reference_state(self, state: dict[str, Tensor]) -> None:
        """Load a `reference_state` in place of reference images."""
        for name in self._reference_names():
            value = state[name].to(self.device)
            setattr(self, name, [value] if isinstance(getattr(self, name), list) else value)
            self._update_count += 1  # torchmetrics warns about a metric that was never updated

    def _reference_names(self) -> list[str]:
        return [name for name in self._defaults if name.startswith("reference_")]

    def _select_rows(self, given: Features | Tensor) -> Tensor:
        """Return the tensor (N, num_features) that this metric reads.

        Raises:
            ValueError: if it is missing, has another width, or is not finite.
        """
        x = given if isinstance(given, Tensor) else getattr(given, self.of)
        if x is None:
            raise ValueError(
                f"{type(self).__name__} reads {self.of!r}, which this feature network does not "
                "return. Choose another network, or leave the metric out."
            )
        if x.ndim != 2 or x.shape[1] != self.num_features:
            raise ValueError(
                f"{type(self).__name__} expects {self.of} (N, {self.num_features}), got "
                f"{tuple(x.shape)}. Use the same feature network for reference and samples."
            )
        if not torch.isfinite(x).all():
            wrong = (~torch.isfinite(x)).any(1).nonzero().flatten().tolist()
            raise ValueError(
                f"{len(wrong)} of {len(x)} images have {self.of} that are not finite "
                f"(positions {wrong[:8]} in the batch)."
            )
        return x.detach().to(self.device)

    def reset(self) -> None:
        """Clear the samples, and the reference too if `reset_real_features`."""
        kept = {}
        if not self.reset_real_features:
            for name in self._reference_names():
                state = getattr(self, name)
                kept[name] = list(state) if isinstance(state, list) else state
        super().reset()  # empties lists in place
        for name, state in kept.items():
            setattr(self, name, state)


class RowsMetric(FeatureMetric):
    """A `FeatureMetric` that keeps rows: list states of tensors (n, width), gathered on compute."""

    keeps_rows = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._widths: dict[str, tuple[int, torch.dtype]] = {}

    def _add_rows(self, name: str, width: int, dtype: torch.dtype) -> None:
        self.add_state(name, default=[], dist_reduce_fx="cat")
        self._widths[name] = (width, dtype)

    def _join_rows(self, name: str) -> Tensor:
        """Return all rows of a state, also after torchmetrics gathered them."""
        rows = getattr(self, name)
        if isinstance(rows, Tensor):
            return rows
        width, dtype = self._widths[name]
        return torch.cat([torch.empty(0, width, dtype=dtype, device=self.device), *rows])

    def reference_state(self) -> dict[str, Tensor]:
        """Return the state of the reference images on this process, rows joined."""
        joined = {name: self._join_rows(name) for name in self._widths}
        return {name: joined.get(name, x) for name, x in super().reference_state().items()}

    def _sync_dist(
        self,
        dist_sync_fn: Callable = gather_all_tensors,
        process_group: Any | None = None,
    ) -> None:
        # A process without rows must gather a tensor of the same rank and width as the others.
        for name in self._widths:
            setattr(self, name, [self._join_rows(name)])
        super()._sync_dist(dist_sync_fn, process_group=process_group)


def has_several_processes() -> bool:
    """Return whether several processes of torch.distributed share the samples."""
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )
