"""Inputs and outputs of the teacher's runs, and the losses of the student's blocks on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion_pl.distill.collecting import TeacherStates
from tinyfusion_pl.distill.hidden_states import Layout, in_backward, watch
from tinyfusion_pl.distill.intervals import Interval, Intervals
from tinyfusion_pl.pruning import get_stack
from tinyfusion_pl.pruning.calls import Call, block_signature

TINY = 1e-12  # least mean square that an error is divided by


@dataclass
class Runs:
    """What the teacher did in one call.

    Attributes:
        calls: By stack path and block, how the first block of a run was called, and the versions of
            its tensors then.
        hidden: By stack path and block, the hidden states that the last block of a run returned.
    """

    calls: Mapping[str, Mapping[int, tuple[Call, list[int]]]]
    hidden: Mapping[str, Mapping[int, tuple[Layout, Mapping[Any, Tensor]]]]


class TeacherRuns:
    """Context manager that collects inputs and outputs of the teacher's runs.

    `streams`: see `HiddenStates`, by stack path.
    """

    def __init__(
        self,
        teacher: nn.Module,
        intervals: Intervals,
        streams: Mapping[str, list[str]] | None = None,
    ) -> None:
        self.states = TeacherStates(
            teacher,
            {p: [(i.block, i.last) for i in each] for p, each in intervals.items()},
            streams,
        )
        self.firsts = [
            (path, i.first, get_stack(teacher, path)[i.first])
            for path, each in intervals.items()
            for i in each
        ]
        self._calls: dict[str, dict[int, tuple[Call, list[int]]]] | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> TeacherRuns:
        self.states.__enter__()
        self._handles = [
            watch(block, before=self._hook(path, index)) for path, index, block in self.firsts
        ]
        self.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self.states.__exit__(*exc)

    def start(self) -> None:
        """Collect anew."""
        self.states.start()
        self._calls = {path: {} for path, _, _ in self.firsts}

    def stop(self) -> None:
        """Collect nothing until the next `start`."""
        self.states.stop()
        self._calls = None

    def take(self) -> Runs:
        """What was collected since the start."""
        assert self._calls is not None  # between start and stop
        return Runs({path: dict(calls) for path, calls in self._calls.items()}, self.states.take())

    def _hook(self, path: str, index: int) -> Any:
        @torch._dynamo.disable
        def collect(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if self._calls is not None and not in_backward():
                call = Call(block_signature(block), args, kwargs)
                self._calls[path][index] = (
                    call,
                    [tensor._version for tensor in call.tensors.values()],
                )

        return collect


def interval_losses(student: nn.Module, runs: Runs, intervals: Intervals) -> dict[str, Tensor]:
    """Relative squared error of each interval, per sample.

    The student's squared error over the mean square of the teacher's output.

    Args:
        student: The shallow model, whose blocks are called by themselves.
        runs: What the teacher did.
        intervals: By stack path.

    Returns:
        By stack path (number of intervals, N), averaged over the streams of a block.

    Raises:
        ValueError: for a block that did not run in the teacher, writes into what it is given, or
            returns other hidden states.
    """
    for path, each in intervals.items():
        for before, after in zip(each, each[1:]):
            _check_handed_on(runs, path, before, after)
    return {
        path: torch.stack([_loss(get_stack(student, path)[i.block], runs, path, i) for i in each])
        for path, each in intervals.items()
    }


def interval_loss(student: nn.Module, runs: Runs, intervals: Intervals) -> Tensor:
    """The mean of `interval_losses` over the intervals of all stacks: (N,)."""
    return torch.cat(list(interval_losses(student, runs, intervals).values())).mean(0)


def _check_handed_on(runs: Runs, path: str, before: Interval, after: Interval) -> None:
    """Raise ValueError unless the second run starts from the output of the first."""
    if before.last not in runs.hidden[path] or after.first not in runs.calls[path]:
        return  # told of either interval
    layout, returned = runs.hidden[path][before.last]
    taken = [
        t.movedim(layout.axis, 0)
        for t in runs.calls[path][after.first][0].tensors.values()
        if t.ndim > layout.axis
    ]
    if lost := [
        key for key, tensor in returned.items() if not any(_same(tensor, each) for each in taken)
    ]:
        what = "what" if lost == [None] else f"output {lost[0]!r} that"
        raise ValueError(
            f"{what.capitalize()} block {before.last} of the teacher's '{path}' returns is not "
            f"what block {after.first} takes: something is added between them, so that no block "
            "alone can stand for a run. Set weight_interval=0."
        )


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return (one.data_ptr(), one.stride()) == (other.data_ptr(), other.stride()) or torch.equal(
        one, other
    )


def _loss(block: nn.Module, runs: Runs, path: str, interval: Interval) -> Tensor:
    if interval.first not in runs.calls[path] or interval.last not in runs.hidden[path]:
        raise ValueError(
            f"Blocks {interval.first} and {interval.last} of the teacher's '{path}' did not both "
            f"run, so that block {interval.block} of the student has nothing to learn from. Set "
            "weight_interval=0."
        )
    call, versions = runs.calls[path][interval.first]
    if changed := [
        name
        for (name, tensor), was in zip(call.tensors.items(), versions)
        if tensor._version != was
    ]:
        raise ValueError(
            f"Block {interval.first} of the teacher's '{path}', or one behind it, writes into "
            f"{changed[0]!r}, which it was given: its input is lost. Set weight_interval=0."
        )
    layout, theirs = runs.hidden[path][interval.last]
    args, kwargs = _moved(call, block)
    ours = layout.take(block(*args, **kwargs))
    common = [key for key in theirs if key in ours]
    if not common or any(ours[key].shape != theirs[key].shape for key in common):
        shapes = [{key: tuple(x.shape) for key, x in each.items()} for each in (ours, theirs)]
        raise ValueError(
            f"Block {interval.block} of the student's '{path}' returns hidden states {shapes[0]}, "
            f"block {interval.last} of the teacher {shapes[1]}; they must be alike. Set "
            "weight_interval=0."
        )
    return torch.stack([_relative_error(ours[key], theirs[key]) for key in common]).mean(0)


def _relative_error(ours: Tensor, theirs: Tensor) -> Tensor:
    """(N, ...) -> (N,)."""
    ours, theirs = ours.float(), theirs.to(ours.device).float()
    return (ours - theirs).square().flatten(1).mean(1) / theirs.square().flatten(1).mean(
        1
    ).clamp_min(TINY)


def _moved(call: Call, block: nn.Module) -> tuple[tuple, dict[str, Any]]:
    """The teacher's call on the device and in the precision of a student's block."""
    like = next((p for p in block.parameters() if p.is_floating_point()), None)
    if like is None:
        return call.args, call.kwargs
    theirs = next(
        (t.dtype for t in call.tensors.values() if t.is_floating_point()), None
    )  # of the hidden states
    cast = not torch.is_autocast_enabled(like.device.type)
    return call.replace(
        {
            name: tensor.to(
                like.device, like.dtype if cast and tensor.dtype == theirs else tensor.dtype
            )
            for name, tensor in call.tensors.items()
        }
    )
