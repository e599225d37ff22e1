"""Recovery losses: fine-tuning, output distillation, representation distillation, masked or not (TinyFusion, section 3.4), LIFT.

loss = weight_kd * kd + weight_data * data + weight_feature(step) * feature, where kd compares the student's prediction with the teacher's,
data with the data itself, and feature the hidden states of paired layers. Published: 0.9, 0.1, and 1e-2 falling to 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion_pl.distill.features import check_feature_mask, feature_loss
from tinyfusion_pl.distill.hidden_states import BlockOutputs, HiddenStates, Layout, float_tensors
from tinyfusion_pl.distill.lift import GROUP_SIZE, check_group_size, lift_loss
from tinyfusion_pl.distill.pairs import Pairs
from tinyfusion_pl.pruning import linear_anneal

Outputs = Mapping[str, Mapping[int, Any]]  # what blocks returned, by stack path and block
OUTPUT_LOSSES = ("mse", "lift")
Hidden = Mapping[str, Mapping[int, tuple[Layout, Mapping[Any, Tensor]]]]  # hidden states, and where a block's output has them


class Distillation:
    """The recovery loss of one batch.

    Args:
        weight_kd: Weight of output distillation, >= 0 (published: 0.9).
        weight_data: Weight of the objective's own loss, >= 0 (published: 0.1).
        weight_feature: Weight of representation distillation at the first step, >= 0 (published: 1e-2); it falls linearly to 0 at the
            last step.
        feature_mask, num_sigma: See `feature_loss` (published: "reference", 2).
        pairs: For each stack path, (student block, teacher block) pairs; default: from the decision, the last kept block of each group
            with the last block of that group.
        output_loss: How output distillation compares the predictions: ``"mse"`` (published), or ``"lift"``, see `lift_loss`.
        group_size: Elements of a group of ``"lift"``, >= 2 (published: 16).

    Raises:
        ValueError: for negative weights, all weights zero, an unknown mask or output loss, or groups that are too small.
    """

    def __init__(self, *, weight_kd: float = 0.9, weight_data: float = 0.1, weight_feature: float = 1e-2, feature_mask: str = "reference",
                 num_sigma: float = 2.0, pairs: Pairs | None = None, output_loss: str = "mse", group_size: int = GROUP_SIZE) -> None:
        weights = {"weight_kd": weight_kd, "weight_data": weight_data, "weight_feature": weight_feature}
        if wrong := {name: w for name, w in weights.items() if not w >= 0}:
            raise ValueError(f"Distillation weights must be >= 0, got {wrong}.")
        if not any(weights.values()):
            raise ValueError("All distillation weights are 0: nothing would be learned. Give at least weight_data > 0.")
        check_feature_mask(feature_mask, num_sigma)
        if output_loss not in OUTPUT_LOSSES:
            raise ValueError(f"output_loss is {output_loss!r}; give one of {', '.join(map(repr, OUTPUT_LOSSES))}.")
        if output_loss != "mse" and not weight_kd:
            raise ValueError(f"output_loss is {output_loss!r}, but weight_kd is 0: outputs would not be compared. Give weight_kd > 0.")
        check_group_size(group_size)
        self.output_loss, self.group_size = output_loss, group_size
        self.weight_kd, self.weight_data, self.weight_feature = weight_kd, weight_data, weight_feature
        self.feature_mask, self.num_sigma = feature_mask, num_sigma
        self.pairs = None if pairs is None else {path: [tuple(pair) for pair in of_path] for path, of_path in pairs.items()}

    @property
    def needs_teacher(self) -> bool:
        return bool(self.weight_kd or self.weight_feature)

    def feature_weight(self, step: int, num_steps: int) -> float:
        """Weight of the feature loss at `step` of `num_steps`, `weight_feature` at the first and 0 at the last."""
        return linear_anneal(step, num_steps, start=self.weight_feature, end=0.0)

    def losses(self, student: nn.Module, teacher: nn.Module | None, objective: Any, draw: Any, y: Tensor, *, pairs: Pairs,
               feature_weight: float) -> dict[str, Tensor]:
        """Per-sample losses (N,): "loss" (the weighted sum), "loss_data", and where weighted "loss_kd" and "loss_feature".

        Teacher and student see the same x_t, t and labels; the teacher runs without a graph. With a feature weight of 0 no hidden
        states are collected.
        """
        pairs = pairs if feature_weight else {}
        with StudentOutputs(student, pairs) as outputs:
            output = student(draw.x_t, draw.t, y)
        data, kd, feature = objective.losses(output, draw)["loss"], None, None
        if self.weight_kd or pairs:
            with torch.no_grad(), TeacherStates(teacher, pairs) as hidden:
                teacher_output = teacher(draw.x_t, draw.t, y)
            if self.weight_kd:
                given = {} if (distance := self.distance()) is None else {"distance": distance}
                kd = objective.distillation_losses(output, teacher_output, draw, **given)["loss_kd"]
            if pairs:
                feature = self.feature_losses(outputs.take(), hidden.take(), pairs)
        return self.total(data, kd=kd, feature=feature, feature_weight=feature_weight)

    def distance(self, *, channel_axis: int = 1) -> Callable[[Tensor, Tensor], Tensor] | None:
        """What compares two predictions, per sample (N,); None for the mean square, which objectives and `output_loss` know."""
        return partial(lift_loss, group_size=self.group_size, channel_axis=channel_axis) if self.output_loss == "lift" else None

    def feature_losses(self, outputs: Outputs, hidden: Hidden, pairs: Pairs) -> Tensor:
        """Representation distillation of one call, averaged over the streams of a pair and the pairs of all stacks. (N,)

        Args:
            outputs: What the student's blocks returned.
            hidden: The teacher's hidden states.
            pairs: The layer pairs.

        Raises:
            ValueError: where a pair has no hidden states in common, or of unequal shapes.
        """
        each = []
        for path, of_path in pairs.items():
            for block, teacher_block in of_path:
                layout, theirs = hidden[path][teacher_block]
                ours = layout.take(outputs[path][block])
                if not (common := [key for key in theirs if key in ours]):
                    raise ValueError(f"Block {block} of the student's '{path}' returns none of the hidden states of the teacher's block "
                                     f"{teacher_block}, its pair. Pair blocks of the same class.")
                each.append(torch.stack([self._feature_loss(ours[key], theirs[key]) for key in common]).mean(0))
        return torch.stack(each).mean(0)

    def _feature_loss(self, ours: Tensor, theirs: Tensor) -> Tensor:
        return feature_loss(ours, theirs.to(ours.device), mask=self.feature_mask, num_sigma=self.num_sigma)

    def total(self, data: Tensor, *, kd: Tensor | None, feature: Tensor | None, feature_weight: float) -> dict[str, Tensor]:
        """The weighted sum "loss" and its terms; terms that are None are left out."""
        terms, total = {"loss_data": data}, self.weight_data * data
        if kd is not None:
            terms["loss_kd"], total = kd, total + self.weight_kd * kd
        if feature is not None:
            terms["loss_feature"], total = feature, total + feature_weight * feature
        return {"loss": total, **terms}


class _OfAllStacks(ExitStack):
    """Collects from the blocks of several stacks while a model runs."""

    def __init__(self, collectors: Mapping[str, BlockOutputs]) -> None:
        super().__init__()
        self.collectors = collectors

    def __enter__(self):
        super().__enter__()
        for collector in self.collectors.values():
            self.enter_context(collector)
        return self

    def start(self) -> None:
        """Collect anew."""
        for collector in self.collectors.values():
            collector.found = {}

    def stop(self) -> None:
        """Collect nothing until the next `start`."""
        for collector in self.collectors.values():
            collector.found = None


class StudentOutputs(_OfAllStacks):
    """What the student's paired blocks return while it runs."""

    def __init__(self, student: nn.Module, pairs: Pairs, collector: type[BlockOutputs] = BlockOutputs) -> None:
        super().__init__({path: collector(student, path, [s for s, _ in of_path]) for path, of_path in pairs.items()})

    def take(self) -> dict[str, dict[int, Any]]:
        """What was collected since the start."""
        return {path: dict(collector.found) for path, collector in self.collectors.items()}


class TeacherStates(_OfAllStacks):
    """The hidden states of the teacher's paired blocks while it runs."""

    def __init__(self, teacher: nn.Module, pairs: Pairs, streams: Mapping[str, list[str]] | None = None) -> None:
        given = streams or {}
        super().__init__({path: HiddenStates(teacher, path, [t for _, t in of_path], streams=given.get(path))
                          for path, of_path in pairs.items()})

    def take(self) -> dict[str, dict[int, tuple[Layout, dict[Any, Tensor]]]]:
        """What was collected since the start."""
        taken: dict[str, dict[int, tuple[Layout, dict[Any, Tensor]]]] = {}
        for path, collector in self.collectors.items():
            taken[path] = {}
            for block, states in collector.found.items():
                layout = collector.layouts[block]
                taken[path][block] = (layout, dict(zip(layout.keys, states if isinstance(states, tuple) else (states,))))
        return taken


_BY_THE_WAY = ("loss", "hidden_states", "attentions", "cross_attentions", "past_key_values")
"""What models of transformers return beside their prediction, where they are asked to."""


def output_loss(output: Any, teacher_output: Any, *, distance: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
    """Mean squared error of what two models return, in float32, averaged over its tensors; of tensors, tuples, lists, `ModelOutput`.

    With `distance`, the mean of that in place of the squared error: tensors must then be batch first. Losses that the models
    computed themselves (tensors without axes) and `ModelOutput`'s records of single layers do not count.

    Raises:
        ValueError: when the outputs do not hold equal numbers of tensors of equal shapes.
    """
    ours, theirs = predictions(output), predictions(teacher_output)
    shapes = [[tuple(t.shape) for t in tensors] for tensors in (ours, theirs)]
    if not ours or shapes[0] != shapes[1]:
        raise ValueError(f"The student returns floating-point tensors of shapes {shapes[0]}, the teacher {shapes[1]}. They must be equal "
                         "and at least one: give a teacher of the student's class and widths.")
    distance = distance or (lambda s, t: (s - t).square())
    return torch.stack([distance(s.float(), t.to(s.device).float()).mean() for s, t in zip(ours, theirs)]).mean()


def predictions(output: Any) -> list[Tensor]:
    """The floating-point tensors in what a model returned that say what it predicts."""
    if isinstance(output, Mapping):
        output = {key: value for key, value in output.items() if key not in _BY_THE_WAY}
    return [tensor for tensor in float_tensors(output) if tensor.ndim]
