"""The calls that a training step makes to the student, and what the teacher answers to the same."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion_pl.distill import (
    StudentOutputs,
    Teacher,
    TeacherStates,
    float_tensors,
    in_backward,
    needs_grad,
)
from tinyfusion_pl.distill.checkpointing import CheckpointedOutputs, LeafGradients
from tinyfusion_pl.distill.interval_losses import Runs, TeacherRuns
from tinyfusion_pl.distill.intervals import Intervals
from tinyfusion_pl.distill.pairs import Pairs
from tinyfusion_pl.distill.teacher import reset_compiled


@dataclass(eq=False)
class StudentCall:
    """One call: what both models returned, and with representation distillation what their paired blocks did.

    Attributes:
        runs: What went into and came out of the intervals' runs of the teacher; None where no interval is trained.
        nodes: Where its outputs are in the graph; none where the call was checkpointed whole.
    """

    teacher_output: Any
    hidden: dict[str, dict[int, Any]]
    checkpointed: bool
    runs: Runs | None = None
    output: Any = None
    outputs: dict[str, dict[int, Any]] = field(default_factory=dict)
    nodes: set[Any] = field(default_factory=set)


class StudentCalls:
    """Records the calls to a student while it trains, and asks the teacher the same.

    Args:
        called: The module that the training step calls: the student, or what `torch.compile` made of it.
        student: The student itself.
        teacher: The teacher.
        pairs: Layer pairs.
        streams: See `HiddenStates`, by stack path.
        is_training: Whether calls count now.
        asks: What the teacher is asked for now: whether for its output, for hidden states, and for the intervals' runs.
        device: Where the student runs, once training has started.
        intervals: By stack path.

    Attributes:
        calls: Those recorded since the last `take`.
        num_recorded: How many there were since the start.
    """

    def __init__(
        self,
        called: nn.Module,
        student: nn.Module,
        teacher: Teacher,
        pairs: Pairs,
        *,
        streams: Any,
        is_training: Callable[[], bool],
        asks: Callable[[], tuple[bool, bool, bool]],
        device: Callable[[], torch.device],
        intervals: Intervals | None = None,
    ) -> None:
        self.teacher, self.student, self.called, self.pairs = teacher, student, called, pairs
        self.is_training, self.asks, self.device = is_training, asks, device
        self.gradients = LeafGradients()
        self.outputs = StudentOutputs(
            student, pairs, functools.partial(CheckpointedOutputs, gradients=self.gradients)
        )
        self.intervals, bare = intervals or {}, getattr(teacher.model, "_orig_mod", teacher.model)
        self.hidden, self.runs = (
            TeacherStates(bare, pairs, streams),
            TeacherRuns(bare, self.intervals, streams),
        )
        self.calls: list[StudentCall] = []
        self._taken: list[StudentCall] = []
        self._open: list[StudentCall | None] = []
        self.num_recorded = 0
        self._handles: list[Any] = []

    def install(self) -> None:
        """Put the hooks on."""
        for collector in (self.outputs, self.hidden, self.runs):
            collector.__enter__()
            collector.stop()
        self._handles = [
            self.called.register_forward_pre_hook(
                torch._dynamo.disable(self._before), with_kwargs=True
            ),
            self.called.register_forward_hook(
                torch._dynamo.disable(self._after), with_kwargs=True, always_call=True
            ),
        ]
        reset_compiled(self.called, self.teacher.model)

    def remove(self) -> None:
        """Take the hooks off, and forget the calls."""
        for collector in (self.outputs, self.hidden, self.runs):
            collector.__exit__(None, None, None)
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.clear()

    def clear(self) -> None:
        """Forget the calls of this batch."""
        self.calls.clear()
        self._taken.clear()
        self._open.clear()
        self.gradients.clear()

    # -- hooks ----------------------------------------------------------------------------------
    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if (
            module is not self.called or in_backward()
        ):  # a copy of the student; or checkpointing runs it again
            return
        checkpointed = not torch.is_grad_enabled() and needs_grad([args, kwargs])
        if (
            not self.student.training
            or not self.is_training()
            or not (torch.is_grad_enabled() or checkpointed)
        ):
            self._open.append(None)
            return
        answer, of_blocks, runs = self._ask(
            args, kwargs
        )  # before the student, which may write into what it is given
        self._open.append(StudentCall(answer, of_blocks, checkpointed, runs))
        if of_blocks:
            self.outputs.start()
            for collector in self.outputs.collectors.values():
                collector.whole = checkpointed

    def _ask(
        self, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, dict[int, Any]], Runs | None]:
        output, states, with_runs = self.asks()
        if not (output or states or with_runs):
            return None, {}, None
        self.teacher.wake(self.device())
        if states:
            self.hidden.start()
        if with_runs:
            self.runs.start()
        answer = self.teacher(args, kwargs)
        of_blocks, runs = (
            self.hidden.take() if states else {},
            self.runs.take() if with_runs else None,
        )
        self.hidden.stop()
        self.runs.stop()
        return answer, of_blocks, runs

    def _after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if module is not self.called:
            return None
        if in_backward():
            return self.gradients.add("", output)
        call = self._open.pop() if self._open else None
        if call is None:
            return None
        call.outputs = self.outputs.take() if call.hidden else {}
        self.outputs.stop()
        trains = (
            call.checkpointed
            or needs_grad(output)
            or any(p.requires_grad for p in self.student.parameters())
        )
        if output is not None and trains:  # neither failed nor frozen (toggle_optimizer does that)
            call.output = self.gradients.stand_in("", output) if call.checkpointed else output
            call.nodes = (
                set()
                if call.checkpointed
                else {t.grad_fn for t in float_tensors(output) if t.grad_fn is not None}
            )
            self.calls.append(call)
            self.num_recorded += 1
        return None

    # -- calls ----------------------------------------------------------------------------------
    def take(self) -> list[StudentCall]:
        """The calls since the last time."""
        calls, self.calls = self.calls, []
        return calls

    def take_reached(self, loss: Tensor) -> tuple[list[StudentCall], bool]:
        """The calls whose outputs `loss` depends on, and whether it depends on one that was taken before."""
        wanted = set().union(*(call.nodes for call in (*self.calls, *self._taken)))
        reached = nodes_behind(loss, wanted)
        mine = [call for call in self.calls if call.checkpointed or call.nodes & reached]
        again = any(call.nodes & reached for call in self._taken)
        self.calls = [call for call in self.calls if call not in mine]
        self._taken += mine
        return mine, again


def nodes_behind(loss: Tensor, wanted: set[Any]) -> set[Any]:
    """Which of the nodes `wanted` are in the graph of `loss`."""
    seen, found, todo = set(), set(), [loss.grad_fn]
    while todo and len(found) < len(wanted):
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in wanted:
            found.add(node)
        todo += [following for following, _ in node.next_functions]
    return found
