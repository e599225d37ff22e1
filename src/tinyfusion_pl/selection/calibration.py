"""The samples on which structures are compared, with the dense model's output for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion_pl.distill import predictions
from tinyfusion_pl.protocols import Objective
from tinyfusion_pl.pruning.calls import quiet


class Calibration:
    """The inputs of N samples and the dense model's output for them.

    Args:
        args: Positional arguments of the model; every tensor whose first axis has size
            `num_samples` holds one value per sample.
        kwargs: Keyword arguments, likewise.
        num_samples: N.
        loss: Computes per-sample losses (N,) from the model's output and `context`; default: none.
        distance: Computes per-sample distances (N,) from an output, the dense model's output and
            `context`; default: the mean squared difference.
        context: Data of the samples for `loss` and `distance` (labels, a `Draw`); indexed like
            `args`.
    """

    def __init__(
        self,
        args: tuple,
        kwargs: Mapping[str, Any] | None = None,
        *,
        num_samples: int,
        context: Any = None,
        loss: Callable[[Any, Any], Tensor] | None = None,
        distance: Callable[[Any, Any, Any], Tensor] | None = None,
    ) -> None:
        self.args, self.kwargs, self.num_samples, self.context = (
            args,
            dict(kwargs or {}),
            num_samples,
            context,
        )
        self._loss, self._distance = loss, distance or mean_square
        self.target: Any = None  # the dense model's output

    @classmethod
    def of(cls, objective: Objective, x: Tensor, y: Tensor) -> Calibration:
        """Data `x` (N, ...) with labels `y` (N,), noised by `objective`, global generator."""
        draw = objective.draw(x)
        return cls(
            (draw.x_t, draw.t, y),
            num_samples=len(x),
            context=draw,
            loss=lambda output, draw: objective.losses(output, draw)["loss"],
            distance=lambda output, target, draw: prediction_distances(
                objective.distillation_losses(output, target, draw)
            ),
        )

    @property
    def has_loss(self) -> bool:
        """Whether a loss was given."""
        return self._loss is not None

    def rows(self, index: Tensor) -> tuple[tuple, dict[str, Any]]:
        """Arguments for the samples at `index`; indices may repeat."""
        return take_rows((self.args, self.kwargs), index, self.num_samples)

    @torch.no_grad()
    def ask(self, model: nn.Module) -> Calibration:
        """Run the dense `model` once and store its output as `target`."""
        if self.target is None:
            with quiet(model):
                self.target = model(*self.args, **self.kwargs)
        return self

    def distances(self, output: Any, index: Tensor) -> Tensor:
        """Distance of each row of `output` to the dense model's, for the samples at `index`."""
        if self.target is None:
            raise ValueError("The dense model's output is missing. Call ask(model) first.")
        target, context = take_rows((self.target, self.context), index, self.num_samples)
        return self._distance(output, target, context)

    def losses(self, output: Any, index: Tensor) -> Tensor:
        """Loss of each row of `output`, for the samples at `index`."""
        if self._loss is None:
            raise ValueError(
                "This criterion needs a loss, but the calibration has none. Pass loss= to "
                "Calibration."
            )
        return self._loss(output, take_rows(self.context, index, self.num_samples))


def prediction_distances(terms: Mapping[str, Tensor]) -> Tensor:
    """Per-sample distance (N,) of predictions, from the terms of `distillation_losses`.

    With a learned variance it is "mse_kd" only: at t = 0, "vb_kd" is the likelihood of the data,
    which is not 0 even for equal student and teacher.
    """
    return terms["mse_kd"] if "mse_kd" in terms else terms["loss_kd"]


def mean_square(output: Any, target: Any, context: Any = None) -> Tensor:
    """Mean squared difference of each sample (N,), averaged over the tensors of the outputs."""
    pairs = zip(predictions(output), predictions(target))
    return torch.stack(
        [(a.float() - b.float()).square().flatten(1).mean(1) for a, b in pairs]
    ).mean(0)


def take_rows(tree: Any, index: Tensor, num_samples: int) -> Any:
    """`tree` with the rows at `index` of every tensor that has `num_samples` rows."""
    if isinstance(tree, Tensor):
        return (
            tree.index_select(0, index.to(tree.device))
            if tree.ndim and len(tree) == num_samples
            else tree
        )
    if hasattr(tree, "rows"):  # e.g. a draw with its own layout
        return tree.rows(index)
    if isinstance(tree, Mapping):
        items = {key: take_rows(value, index, num_samples) for key, value in tree.items()}
        return items if type(tree) is dict else type(tree)(**items)
    if isinstance(tree, (tuple, list)):
        values = [take_rows(value, index, num_samples) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    if is_dataclass(tree) and not isinstance(tree, type):
        return replace(
            tree,
            **{f.name: take_rows(getattr(tree, f.name), index, num_samples) for f in fields(tree)},
        )
    return tree
