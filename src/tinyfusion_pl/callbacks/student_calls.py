"""Records the calls that a training step makes to the student, and repeats them on the teacher."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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
    """One call: what both models and, for representation distillation, their paired blocks return.

    Attributes:
        teacher_output: Output of the teacher.
        hidden: Hidden states of the teacher's paired blocks, by stack path and block.
        checkpointed: Whether the whole call runs under reentrant activation checkpointing.
        runs: Inputs and outputs of the teacher's runs of blocks; None if no interval is trained.
        output: Output of the student.
        outputs: Outputs of the student's paired blocks, by stack path and block.
        nodes: Graph nodes of the student's output; empty if the call is checkpointed.
    """

    teacher_output: Any
    hidden: dict[str, dict[int, Any]]
    checkpointed: bool
    runs: Runs | None = None
    output: Any = None
    outputs: dict[str, dict[int, Any]] = field(default_factory=dict)
    nodes: set[Any] = field(default_factory=set)


class TeacherRequest(NamedTuple):
    """What a call needs of the teacher.

    Attributes:
        output: Whether its output is needed.
        hidden: Whether the hidden states of its paired blocks are needed.
        runs: Whether the inputs and outputs of its runs of blocks are needed.
    """

    output: bool
    hidden: bool
    runs: bool


class StudentCalls:
    """Records the calls to a student while it trains, and repeats them on the teacher.

    Args:
        called: The module that the training step calls: the student, or its compiled wrapper.
        student: The student itself.
        teacher: The teacher.
        pairs: Layer pairs.
        streams: See `HiddenStates`, by stack path.
        is_training: Returns whether calls are recorded now.
        request: Returns what a call needs of the teacher now.
        device: Returns the device of the student, once training has started.
        intervals: Intervals by stack path.

    Attributes:
        calls: The calls recorded since the last `take`.
        num_recorded: Number of calls recorded in total.
    """

    def __init__(
        self,
        called: nn.Module,
        student: nn.Module,
        teacher: Teacher,
        pairs: Pairs,
        *,
        streams: Mapping[str, Sequence[str]] | None,
        is_training: Callable[[], bool],
        request: Callable[[], TeacherRequest],
        device: Callable[[], torch.device],
        intervals: Intervals | None = None,
    ) -> None:
        self.teacher, self.student, self.called, self.pairs = teacher, student, called, pairs
        self.is_training, self.request, self.device = is_training, request, device
        self.gradients = LeafGradients()
        collector = functools.partial(CheckpointedOutputs, gradients=self.gradients)
        # StudentOutputs only calls its collector, as a class or as any other factory.
        self.outputs = StudentOutputs(student, pairs, collector)  # type: ignore[arg-type]
        self.intervals: Intervals = intervals or {}
        bare = getattr(teacher.model, "_orig_mod", teacher.model)
        names = None if streams is None else {path: list(each) for path, each in streams.items()}
        self.hidden = TeacherStates(bare, pairs, names)
        self.runs = TeacherRuns(bare, self.intervals, names)
        self.calls: list[StudentCall] = []
        self._taken: list[StudentCall] = []
        self._open: list[StudentCall | None] = []
        self.num_recorded = 0
        self._handles: list[Any] = []

    def install(self) -> None:
        """Register the hooks."""
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
        """Remove the hooks and delete the calls."""
        for collector in (self.outputs, self.hidden, self.runs):
            collector.__exit__(None, None, None)
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.clear()

    def clear(self) -> None:
        """Delete the calls of this batch."""
        self.calls.clear()
        self._taken.clear()
        self._open.clear()
        self.gradients.clear()

    # -- hooks ----------------------------------------------------------------------------------
    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        # Hooks also run on a copy of the student, and when checkpointing recomputes a call.
        if module is not self.called or in_backward():
            return
        checkpointed = not torch.is_grad_enabled() and needs_grad([args, kwargs])
        if (
            not self.student.training
            or not self.is_training()
            or not (torch.is_grad_enabled() or checkpointed)
        ):
            self._open.append(None)
            return
        # The teacher runs first, because the student may modify its inputs in place.
        call = self._call_teacher(args, kwargs, checkpointed=checkpointed)
        self._open.append(call)
        if call.hidden:
            self.outputs.start()
            for collector in self.outputs.collectors.values():
                assert isinstance(collector, CheckpointedOutputs)
                collector.whole = checkpointed

    def _call_teacher(
        self, args: tuple, kwargs: dict[str, Any], *, checkpointed: bool
    ) -> StudentCall:
        request = self.request()
        if not any(request):
            return StudentCall(None, {}, checkpointed)
        self.teacher.wake(self.device())
        if request.hidden:
            self.hidden.start()
        if request.runs:
            self.runs.start()
        output = self.teacher(args, kwargs)
        hidden = self.hidden.take() if request.hidden else {}
        runs = self.runs.take() if request.runs else None
        self.hidden.stop()
        self.runs.stop()
        return StudentCall(output, hidden, checkpointed, runs)

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
        # A call that failed has no output; toggle_optimizer may have frozen the student.
        if output is not None and trains:
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
        """The calls since the last `take`."""
        calls, self.calls = self.calls, []
        return calls

    def take_reached(self, loss: Tensor) -> tuple[list[StudentCall], bool]:
        """The new calls that `loss` depends on, and whether it depends on one taken before."""
        wanted = {node for call in (*self.calls, *self._taken) for node in call.nodes}
        reached = nodes_behind(loss, wanted)
        taken = [call for call in self.calls if call.checkpointed or call.nodes & reached]
        again = any(call.nodes & reached for call in self._taken)
        self.calls = [call for call in self.calls if call not in taken]
        self._taken += taken
        return taken, again


def nodes_behind(loss: Tensor, wanted: set[Any]) -> set[Any]:
    """The nodes among `wanted` that are in the graph of `loss`."""
    seen: set[Any] = set()
    found: set[Any] = set()
    todo: list[Any] = [loss.grad_fn]
    while todo and len(found) < len(wanted):
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in wanted:
            found.add(node)
        todo += [following for following, _ in node.next_functions]
    return found
