"""A gated block: y = m * block(x) + (1 - m) * x for each of its streams.

See `blending` for the formula, `streams` for what a block carries, `masks` for m.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from tinyfusion_pl.pruning.batch_axes import BatchPlan, couples_samples, plan_batch, shape_key
from tinyfusion_pl.pruning.blending import blend, lerp, with_zero_gradients, without_graph
from tinyfusion_pl.pruning.calls import Call, block_signature
from tinyfusion_pl.pruning.compiled import Compiler, mark_batch
from tinyfusion_pl.pruning.masks import Split
from tinyfusion_pl.pruning.streams import Key

if TYPE_CHECKING:
    from tinyfusion_pl.pruning.assignment import Assignment
    from tinyfusion_pl.pruning.masks import Masks
    from tinyfusion_pl.pruning.stack_gates import StackGates


class GateOwner(Protocol):
    """What a gated block asks of the gates that it is one of (`DepthGates`)."""

    masks: Masks
    gather: bool
    bypassed: bool
    forced: bool
    given_streams: Mapping[str, list[str]]
    recorder: Callable[[GatedForward, Call], Any] | None

    def keeps(self, gated: GatedForward) -> bool:
        """Whether the current decision keeps the block."""

    def check_checkpointing(self, gated: GatedForward, first: Tensor) -> None:
        """Raise RuntimeError for activation checkpointing that the gates do not go with."""


class GatedForward:
    """Stands in for the ``forward`` of one block; in training each sample keeps or drops the block by its mask.

    In evaluation mode the current decision holds.
    """

    def __init__(
        self, owner: GateOwner, gates: StackGates, block: nn.Module, unit: int, *, name: str
    ) -> None:
        self.owner, self.gates, self.block, self.unit, self.name = owner, gates, block, unit, name
        self.original = block.forward
        self.instance_forward = "forward" in block.__dict__
        self.signature = block_signature(block)
        self.plans: dict[tuple, BatchPlan] = {}
        self.compiler: Compiler | None = None  # of the block, or of what holds it
        self._compiled: Callable | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": None}  # bound to this block, not to its copy

    def install(self) -> None:
        # A bound method, not a closure: copy.deepcopy then binds the copy to the copied block and
        # gates.
        self.block.forward = types.MethodType(GatedForward.forward, self)

    def remove(self) -> None:
        del self.block.forward
        if self.instance_forward:
            self.block.forward = self.original

    def compile(self, compiler: Compiler | None) -> None:
        """Run the block compiled by `compiler`; the gate around it is never traced."""
        self.compiler, self._compiled = compiler, None

    def _run(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The block's own forward, compiled where it is."""
        if self.compiler is None:
            return self.original(*args, **kwargs)
        if self._compiled is None:
            self._compiled = self.compiler(self.original)
        return self._compiled(*args, **kwargs)

    @torch.compiler.disable  # masks change with each batch
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.owner.recorder is not None:
            self.owner.recorder(self, Call(self.signature, args, kwargs))
        if self.owner.bypassed:
            return self._run(args, kwargs)
        call = Call(self.signature, args, kwargs)
        if self.owner.masks.assignment is not None:
            return self._assigned(call, self.plan(call), self.owner.masks.assignment)
        if self.block.training or self.owner.forced:
            return self._train(call, self.plan(call))
        return self._decided(call)

    def plan(self, call: Call) -> BatchPlan:
        """How this call's batch may be divided; learned at the first call with its pattern of shapes."""
        key = (
            couples_samples(self.block),
            *shape_key(call),
        )  # batch statistics may be off at the first call (`quiet`)
        if key not in self.plans:
            given = self.owner.given_streams.get(self.gates.path)
            self.plans[key] = plan_batch(
                self.block, self.original, call, given=given, name=self.name
            )
        return self.plans[key]

    def _decided(self, call: Call) -> Any:
        if self.owner.keeps(self):
            return self._run(call.args, call.kwargs)
        plan = self.plan(call)
        x = self._streams(call, plan)
        return plan.streams.put(
            x, self._run(call.args, call.kwargs) if plan.streams.extras else None
        )

    def plain_because(self, plan: BatchPlan) -> str:
        """Why the block runs by the plain formula; empty where its samples are gathered."""
        if not self.owner.gather:
            return "gather=False"
        if self.compiler is not None and self.compiler.is_static:
            return plan.plain_because or "it is compiled with dynamic=False"
        return plan.plain_because

    def _assigned(self, call: Call, plan: BatchPlan, assignment: Assignment) -> Any:
        """Each row under its own structure, rows of equal state run once (no graph)."""
        x, run = self._streams(call, plan), assignment.run(self.gates.path, self.unit)
        num_rows = next(iter(x.values())).shape[plan.axis]
        if num_rows != assignment.num_structures * assignment.num_samples:
            raise ValueError(f"{self.name} sees a batch of {num_rows}, but {assignment.num_structures} structures of "
                             f"{assignment.num_samples} samples each were to be run: the model changes its batch inside.")  # fmt: skip
        device = next(iter(x.values())).device
        if plan.plain_because:
            output = self._call(call, plan)
            if run is not None:
                y, rows = self._taken(call, plan, output, x), run.kept.to(device)
                x = {k: _put(x[k], y[k].index_select(plan.axis, rows), rows, plan.axis) for k in x}
            return plan.streams.put(x, output)
        if run is None:
            return plan.streams.put(x)
        y, source = self._part(call, plan, run.rows.to(device)), run.source
        if source is not None:
            y = {k: each.index_select(plan.axis, source.to(device)) for k, each in y.items()}
        return plan.streams.put({k: _put(x[k], y[k], run.kept.to(device), plan.axis) for k in x})

    # -- training -------------------------------------------------------------------------------
    def _train(self, call: Call, plan: BatchPlan) -> Any:
        first = call.tensors[plan.streams.names[0]]
        num_samples = first.shape[plan.axis]
        self.owner.check_checkpointing(self, first)
        mask = self.owner.masks.column(self.gates, self.unit, num_samples)  # (N,)
        gather = not self.plain_because(plan)
        return self.gate(
            call,
            plan,
            mask,
            self.owner.masks.split(self.gates, self.unit, num_samples) if gather else None,
        )

    def gate(self, call: Call, plan: BatchPlan, mask: Tensor, split: Split | None) -> Any:
        """What the block returns for samples of which `mask` (N,) says who keeps it; `split` None: by the plain formula."""
        x = self._streams(call, plan)
        num_samples = len(mask)
        if split is None:
            return self._plain(call, plan, x, mask)
        options = {"axis": plan.axis, "generation": self.owner.masks.generation}
        if split.num_kept == num_samples:
            output = self._call(call, plan)
            y = self._taken(call, plan, output, x)
            return plan.streams.put({k: blend(x[k], y[k], mask, **options) for k in x}, output)
        if split.num_kept == 0:
            with without_graph(keep_cast_cache=False):
                y = self._taken(call, plan, self._call(call, plan), x)
            needy = [
                t for t in (*self.block.parameters(), *self._others(call, plan)) if t.requires_grad
            ]
            if needy and torch.is_grad_enabled():
                key = next(iter(x))
                x = {**x, key: with_zero_gradients(x[key], needy)}
            return plan.streams.put(
                {k: blend(x[k], None, mask, dropped=y[k], **options) for k in x}
            )
        kept = self._part(call, plan, split.kept)
        with without_graph(keep_cast_cache=True):
            dropped = self._part(call, plan, split.dropped)
        blended = {
            k: blend(x[k], kept[k], mask, split=split, dropped=dropped[k], **options) for k in x
        }
        return plan.streams.put(blended)

    def _plain(self, call: Call, plan: BatchPlan, x: Mapping[Key, Tensor], mask: Tensor) -> Any:
        """The formula as it is written, on all samples; the block runs once."""
        output = self._call(call, plan)
        y = self._taken(call, plan, output, x)
        return plan.streams.put({k: lerp(mask, y[k], x[k], axis=plan.axis) for k in x}, output)

    def _call(self, call: Call, plan: BatchPlan) -> Any:
        """The block's own output for all samples."""
        if self.compiler is not None and not self.plain_because(plan):
            mark_batch(call.tensors, plan.axes)
        if not plan.writes_streams:
            return self._run(call.args, call.kwargs)
        args, kwargs = call.replace({n: call.tensors[n].clone() for n in plan.streams.names})
        return self._run(args, kwargs)

    def _part(self, call: Call, plan: BatchPlan, index: Tensor) -> dict[Key, Tensor]:
        """The streams that the block returns for the samples at `index`."""
        if self.compiler is None:
            return self._taken(call, plan, self._run(*call.replace(plan.select(call, index))))
        # A batch of one would be compiled on its own, so a lone sample runs as two.
        tensors = plan.select(call, index.repeat(2) if len(index) == 1 else index)
        mark_batch(tensors, plan.axes)
        y = self._taken(call, plan, self._run(*call.replace(tensors)))
        return {key: each.narrow(plan.axis, 0, len(index)) for key, each in y.items()}

    def _taken(
        self, call: Call, plan: BatchPlan, output: Any, like: Mapping[Key, Tensor] | None = None
    ) -> Mapping[Key, Tensor]:
        """The streams in `output`, whose shapes must be those that went in."""
        y = plan.streams.take(output)
        for key, x in (like or {}).items():
            if not isinstance(y[key], Tensor) or y[key].shape != x.shape:
                got = tuple(y[key].shape) if isinstance(y[key], Tensor) else y[key]
                raise ValueError(f"{self.name} took '{plan.streams.inputs[key]}' of shape {tuple(x.shape)} and returned {got}. "
                                 "A block that can be dropped returns hidden states of the shape that it takes.")  # fmt: skip
        return y

    def _streams(self, call: Call, plan: BatchPlan) -> dict[Key, Tensor]:
        return {key: call.tensors[name] for key, name in plan.streams.inputs.items()}

    def _others(self, call: Call, plan: BatchPlan) -> list[Tensor]:
        return [t for name, t in call.tensors.items() if name not in plan.streams.names]


def _put(x: Tensor, y: Tensor, rows: Tensor, axis: int) -> Tensor:
    """`x` with `y` at `rows`."""
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(dtype).index_copy(axis, rows, y.to(dtype))
