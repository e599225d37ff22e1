"""The inputs on which structures are compared, with the dense model's answers to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion_pl.distill import predictions
from tinyfusion_pl.pruning.calls import quiet

Losses = Callable[[Any, Any], Tensor]


class Calibration:
    """N samples of a model's call.

    Args:
        args, kwargs: The call; every tensor whose first axis has the size `num_samples` is one value a sample.
        num_samples: N.
        loss: Per-sample losses (N,) of the model's output for these samples: called with the output and `context`; default: none.
        distance: Per-sample distances (N,) of an output to the dense model's: called with both and `context`; default: the mean squared
            difference.
        context: What `loss` and `distance` need of the samples (labels, a `Draw`); divided like `args`.
    """

    def __init__(
        self, args: tuple, kwargs: Mapping[str, Any] | None = None, *, num_samples: int, context: Any = None,
        loss: Callable[[Any, Any], Tensor] | None = None, distance: Callable[[Any, Any, Any], Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.args, self.kwargs, self.num_samples, self.context = (
            args,
            dict(kwargs or {}),
            num_samples,
            context,
        )
        self._loss, self._distance = loss, distance or mean_square
        self.target: Any = None  # the dense model's output

    @classmethod
    def of(cls, objective: Any, x: Tensor, y: Tensor) -> Calibration:
        """Samples `x` (N, ...) with labels `y` (N,), noised by `objective` with the global generator."""
        draw = objective.draw(x)
        return cls(
            (draw.x_t, draw.t, y), num_samples=len(x), context=draw,
            loss=lambda output, draw: objective.losses(output, draw)["loss"],
            distance=lambda output, target, draw: prediction_distances(
                objective.distillation_losses(output, target, draw)
            ),
        )  # fmt: skip

    @property
    def has_loss(self) -> bool:
        return self._loss is not None

    def rows(self, index: Tensor) -> tuple[tuple, dict[str, Any]]:
        """The call for the samples at `index`, which may repeat."""
        return take_rows((self.args, self.kwargs), index, self.num_samples)

    @torch.no_grad()
    def ask(self, model: nn.Module) -> Calibration:
        """Keep the output of `model`, the dense one, as what others are compared with."""
        if self.target is None:
            with quiet(model):
                self.target = model(*self.args, **self.kwargs)
        return self

    def distances(self, output: Any, index: Tensor) -> Tensor:
        """Distance of each row of `output` to the dense model's, for the samples at `index`."""
        if self.target is None:
            raise ValueError(
                "The dense model's output is needed and was not asked for: call ask(model) first."
            )
        target, context = take_rows((self.target, self.context), index, self.num_samples)
        return self._distance(output, target, context)

    def losses(self, output: Any, index: Tensor) -> Tensor:
        """Loss of each row of `output`, for the samples at `index`."""
        if self._loss is None:
            raise ValueError(
                "This choice needs a loss of the model's output, and none was given: pass loss=."
            )
        return self._loss(output, take_rows(self.context, index, self.num_samples))


def prediction_distances(terms: Mapping[str, Tensor]) -> Tensor:
    """Per-sample distance (N,) of predictions, from the terms of an objective's `distillation_losses`.

    Of a model with a learned variance it is "mse_kd" alone: "vb_kd" at t = 0 is the likelihood of the data, which is not
    0 where student and teacher are equal.
    """
    return terms["mse_kd"] if "mse_kd" in terms else terms["loss_kd"]


def mean_square(output: Any, target: Any, context: Any = None) -> Tensor:
    """Mean squared difference of each sample (N,), averaged over the tensors of the outputs."""
    pairs = zip(predictions(output), predictions(target))
    return torch.stack(
        [(a.float() - b.float()).square().flatten(1).mean(1) for a, b in pairs]
    ).mean(0)


def take_rows(tree: Any, index: Tensor, num_samples: int) -> Any:
    """`tree` with the rows at `index` of every tensor that has `num_samples` of them."""
    if isinstance(tree, Tensor):
        return (
            tree.index_select(0, index.to(tree.device))
            if tree.ndim and len(tree) == num_samples
            else tree
        )
    if hasattr(tree, "rows"):  # knows how
        return tree.rows(index)
    if isinstance(tree, Mapping):
        items = {key: take_rows(value, index, num_samples) for key, value in tree.items()}
        return items if type(tree) is dict else type(tree)(**items)
    if isinstance(tree, (tuple, list)):
        items = [take_rows(value, index, num_samples) for value in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    if is_dataclass(tree) and not isinstance(tree, type):
        return replace(
            tree,
            **{f.name: take_rows(getattr(tree, f.name), index, num_samples) for f in fields(tree)},
        )
    return tree
