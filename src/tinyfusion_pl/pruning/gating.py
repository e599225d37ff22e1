"""A gated block: y = m * block(x) + (1 - m) * x, without paying for gradients that are zero (TinyFusion, section 3.2, equation 4).

Where a sample's mask is 0, neither the block's weights nor its input get a gradient through the block; only the mask does, and that is
<g, block(x) - x>. So those samples run without a graph, the others are gathered and run with one, and both are put back in place. Every
gradient is that of the plain formula.
"""

from __future__ import annotations

import inspect
import types
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tinyfusion_pl.pruning.arguments import BatchAxes, map_tensors, select, tensors_in

if TYPE_CHECKING:
    from tinyfusion_pl.pruning.gates import DepthGates, StackGates


class GatedForward:
    """Stands in for the ``forward`` of one block.

    The first parameter of the block is the hidden state, a tensor or a tuple of tensors with the batch as first axis.
    A block that returns a tuple for a tensor has its first item gated; the further items pass through.
    """

    def __init__(self, owner: DepthGates, gates: StackGates, block: nn.Module, unit: int, *, name: str, opens: bool) -> None:
        self.owner, self.gates, self.block, self.unit, self.name, self.opens = owner, gates, block, unit, name, opens
        self.original = block.forward
        self.instance_forward = "forward" in block.__dict__
        self.axes = BatchAxes(name, owner.announced)
        # Batch statistics couple the samples: a split batch would not give the plain formula's numbers.
        self.couples_samples = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in block.modules())
        self.same_structure: bool | None = None  # whether the block returns what it takes; learned at the first call
        self.first_name = _first_name(self.original)

    def install(self) -> None:
        # A bound method, not a closure: copy.deepcopy then binds the copy to the copied block and gates.
        self.block.forward = types.MethodType(GatedForward.forward, self)

    def remove(self) -> None:
        del self.block.forward
        if self.instance_forward:
            self.block.forward = self.original

    # -- the formula --------------------------------------------------------------------------------------------------------------------
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            x, rest = args[0], (args[1:], kwargs)
            call = lambda x, rest: self.original(x, *rest[0], **rest[1])  # noqa: E731
        else:
            name = self.first_name if self.first_name in kwargs else next(iter(kwargs))
            x, rest = kwargs[name], {k: v for k, v in kwargs.items() if k != name}
            call = lambda x, rest: self.original(**{name: x}, **rest)  # noqa: E731
        return self._train(x, rest, call) if self.block.training else self._decided(x, rest, call)

    def _decided(self, x, rest, call):
        kept = self.owner.keeps(self)
        if not kept and self.same_structure:
            return x
        output = call(x, rest)
        self.same_structure = isinstance(output, tuple) == isinstance(x, tuple)
        if kept:
            return output
        return x if self.same_structure else (x, *output[1:])

    def _train(self, x, rest, call):
        hidden = x[0] if isinstance(x, tuple) else x
        draw, masks = self.owner.masks_for(self, hidden)
        split, mask = draw.splits[self.unit], masks[:, self.unit]  # (N,)
        extras = tensors_in(rest)
        num_samples = draw.num_samples
        # A recomputation must run as its forward did, in one piece or in two: dropout draws for what it is given.
        if not self.owner.gather or self.couples_samples or self.name in draw.plain:
            return self._plain(x, call(x, rest), mask)
        if split.num_kept == num_samples:
            return self._blend(x, call(x, rest), mask, None, None)
        per_sample = self.axes.per_sample(extras, hidden) if 0 < split.num_kept < num_samples else []
        if per_sample is None or (self.same_structure is False and split.num_kept < num_samples):
            draw.plain.add(self.name)
            return self._plain(x, call(x, rest), mask)
        if split.num_kept == 0:
            with _without_graph(keep_cast_cache=False):
                output = call(x, rest)
            if not self._returns_like(x, output):
                draw.plain.add(self.name)
                return self._plain(x, call(x, rest), mask)
            # Zero gradients, not None, as the plain formula gives: optimizers treat them differently, and DDP waits for them.
            needy = [p for p in (*self.block.parameters(), *extras) if p.requires_grad]
            first = x[0] if isinstance(x, tuple) else x
            linked = _ZeroGradients.apply(first, *needy) if needy and torch.is_grad_enabled() else first
            x = (linked, *x[1:]) if isinstance(x, tuple) else linked
            return self._blend(x, None, mask, None, output)
        pick = lambda index: (map_tensors(lambda t: t.index_select(0, index), x), select(rest, per_sample, index))  # noqa: E731
        kept = call(*pick(split.kept))
        if not self._returns_like(x, kept):
            draw.plain.add(self.name)
            return self._plain(x, call(x, rest), mask)
        with _without_graph(keep_cast_cache=True):
            dropped = call(*pick(split.dropped))
        return self._blend(x, kept, mask, split, dropped)

    def _returns_like(self, x, output) -> bool:
        self.same_structure = isinstance(output, tuple) == isinstance(x, tuple)
        return self.same_structure

    def _plain(self, x, output, mask):
        """The formula as it is written, on all samples."""
        if isinstance(output, tuple) and not isinstance(x, tuple):
            return (_lerp(mask, output[0], x), *output[1:])
        if isinstance(output, tuple):
            return tuple(_lerp(mask, y, x_) for y, x_ in zip(output, x, strict=True))
        return _lerp(mask, output, x)

    def _blend(self, x, kept, mask, split, dropped):
        if isinstance(x, tuple):
            n = len(x)
            return tuple(self._blend(x_, k, mask, split, d) for x_, k, d in
                         zip(x, kept or [None] * n, dropped or [None] * n, strict=True))
        if split is None and dropped is None and isinstance(kept, tuple):  # all kept, further items pass through
            return (_Blend.apply(x, kept[0], None, mask, None, None), *kept[1:])
        indices = (None, None) if split is None else (split.kept, split.dropped)
        return _Blend.apply(x, kept, dropped, mask, *indices)


def _first_name(function: Any) -> str | None:
    try:
        return next(iter(inspect.signature(function).parameters), None)
    except (TypeError, ValueError):  # not every callable can be looked into
        return None


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))


def _lerp(mask: Tensor, y: Tensor, x: Tensor) -> Tensor:
    m = _per_sample(mask, x).to(torch.promote_types(x.dtype, y.dtype))
    return m * y + (1 - m) * x


class _Blend(torch.autograd.Function):
    """Puts kept samples' outputs over x; hands the mask its gradient <g, block(x) - x> for every sample.

    `kept` or `dropped` is None where there is no such sample, and the indices are None where all samples agree.
    """

    @staticmethod
    def forward(ctx, x, kept, dropped, mask, kept_index, dropped_index):
        y = dropped if kept is None else kept
        dtype = torch.promote_types(x.dtype, y.dtype)
        ctx.dtypes = x.dtype, y.dtype, mask.dtype
        ctx.indices, ctx.all_kept, ctx.all_dropped = (kept_index, dropped_index), dropped is None, kept is None
        if ctx.all_kept:
            out, delta = kept.to(dtype, copy=kept.dtype == dtype), None
        elif ctx.all_dropped:
            out = x.to(dtype, copy=x.dtype == dtype)
        else:
            out = x.to(dtype, copy=x.dtype == dtype)
            out.index_copy_(0, kept_index, kept.to(dtype))
        if ctx.needs_input_grad[3]:  # one tensor saved a block: the plain formula keeps two
            delta = torch.empty_like(out)
            if ctx.all_kept or ctx.all_dropped:
                torch.sub(y, x, out=delta)
            else:
                delta.index_copy_(0, kept_index, kept.to(dtype)).index_copy_(0, dropped_index, dropped.to(dtype)).sub_(x)
            ctx.save_for_backward(delta)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x_dtype, y_dtype, mask_dtype = ctx.dtypes
        kept_index, _ = ctx.indices
        grad_x = grad_kept = grad_mask = None
        if ctx.needs_input_grad[0]:
            if ctx.all_kept:
                grad_x = torch.zeros_like(g, dtype=x_dtype)
            elif ctx.all_dropped:
                grad_x = g.to(x_dtype)
            else:
                grad_x = g.to(x_dtype, copy=g.dtype == x_dtype).index_fill_(0, kept_index, 0)
        if not ctx.all_dropped and ctx.needs_input_grad[1]:
            grad_kept = (g if ctx.all_kept else g.index_select(0, kept_index)).to(y_dtype)
        if ctx.needs_input_grad[3]:
            (delta,) = ctx.saved_tensors
            # In float32: the candidates' gradients nearly cancel, and half precision would leave only rounding of them.
            grad_mask = torch.einsum("nd,nd->n", g.flatten(1).float(), delta.flatten(1).float()).to(mask_dtype)
        return grad_x, grad_kept, None, grad_mask, None, None


class _ZeroGradients(torch.autograd.Function):
    """The identity on x that gives each further tensor a gradient of zeros."""

    @staticmethod
    def forward(ctx, x, *tensors):
        ctx.tensors = tensors
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g, *(torch.zeros_like(t) if needed else None for t, needed in zip(ctx.tensors, ctx.needs_input_grad[1:]))


@contextmanager
def _without_graph(*, keep_cast_cache: bool):
    """No graph; and no low-precision copy of a weight that autocast would keep, graphless, for a later call with a graph."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(cached and keep_cast_cache)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)
