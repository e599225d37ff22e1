"""What the metrics share: they accumulate what a feature network said of images, over batches and processes in any order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from tinyfusion_pl.metrics.features import Features


class FeatureMetric(Metric):
    """A metric of `Features`, or of one of their tensors given directly.

    Args:
        of: Which of the `Features` it looks at: ``"features"``, ``"spatial"`` or ``"logits"``.
        num_features: Width of that tensor.
        reset_real_features: Whether ``reset()`` forgets the reference too, as in torchmetrics.
        kwargs: torchmetrics' own (``sync_on_compute``, ...).
    """

    is_differentiable = False
    full_state_update = False
    num_required = 1  # images of each side
    needs_reference = True
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

    def _rows(self, given: Features | Tensor) -> Tensor:
        """The tensor (N, num_features) that this metric looks at; `ValueError` unless it is finite and as wide as expected."""
        x = given if isinstance(given, Tensor) else getattr(given, self.of)
        if x is None:
            raise ValueError(
                f"{type(self).__name__} looks at {self.of!r}, which this feature network does not give."
            )
        if x.ndim != 2 or x.shape[1] != self.num_features:
            raise ValueError(
                f"{type(self).__name__} takes {self.of} (N, {self.num_features}); these are {tuple(x.shape)}. A reference and "
                "samples must come from the same feature network."
            )
        if not torch.isfinite(x).all():
            wrong = (~torch.isfinite(x)).any(1).nonzero().flatten().tolist()
            raise ValueError(
                f"{len(wrong)} of {len(x)} images have {self.of} that are not finite (places {wrong[:8]} of the batch)."
            )
        return x.detach().to(self.device)

    def settings(self) -> dict[str, Any]:
        """What decides the number beside the images."""
        return {"of": self.of, **{name: getattr(self, name) for name in self.SETTINGS}}

    def reset(self) -> None:
        names = (
            ()
            if self.reset_real_features
            else [name for name in self._defaults if name.startswith("reference_")]
        )
        kept = {
            name: list(state) if isinstance(state := getattr(self, name), list) else state
            for name in names
        }
        super().reset()  # empties lists in place
        for name, state in kept.items():
            setattr(self, name, state)


class RowsMetric(FeatureMetric):
    """A `FeatureMetric` that keeps rows: states that are lists of tensors (n, width), joined over processes."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._widths: dict[str, tuple[int, torch.dtype]] = {}

    def _add_rows(self, name: str, width: int, dtype: torch.dtype) -> None:
        self.add_state(name, default=[], dist_reduce_fx="cat")
        self._widths[name] = (width, dtype)

    def _joined(self, name: str) -> Tensor:
        """All rows of a state, also after torchmetrics joined those of the processes."""
        rows = getattr(self, name)
        if isinstance(rows, Tensor):
            return rows
        width, dtype = self._widths[name]
        return torch.cat([torch.empty(0, width, dtype=dtype, device=self.device), *rows])

    def _sync_dist(
        self, dist_sync_fn: Callable | None = None, process_group: Any | None = None
    ) -> None:
        # A process without rows would take part with a tensor of another rank and shape, which cannot be gathered.
        for name in self._widths:
            setattr(self, name, [self._joined(name)])
        super()._sync_dist(dist_sync_fn, process_group=process_group)
