"""y = m * block(x) + (1 - m) * x, and the same without paying for gradients that are zero.

TinyFusion (arXiv 2412.01199), section 3.2, equation 4. Where a sample's mask is 0, neither the
block's weights nor its input get a gradient through the block; only the mask does, and that is
<g, block(x) - x>. So those samples run without a graph, the others are gathered and run with one,
and both are put back in place. Every gradient is that of the plain formula.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tinyfusion_pl.pruning.masks import Split

DEVICES = ("cpu", "cuda", "mps", "xpu")


def lerp(mask: Tensor, y: Tensor, x: Tensor, *, axis: int = 0) -> Tensor:
    """The formula as it is written; `mask` (N,), N the size of `axis`."""
    shape = [1] * x.ndim
    shape[axis] = -1
    m = mask.view(shape).to(torch.promote_types(x.dtype, y.dtype))
    return m * y + (1 - m) * x


def blend(
    x: Tensor, kept: Tensor | None, mask: Tensor, *, split: Split | None = None, dropped: Tensor | None = None,
    axis: int = 0, generation: int = 0,
) -> Tensor:  # fmt: skip
    """X with the outputs of the kept samples in place.

    Args:
        x: Hidden states of all samples.
        kept: Outputs of the samples that keep the block, with a graph; None where there are none.
        mask: (N,) zeros and ones; gets the gradient <g, block(x) - x> of each sample.
        split: Which samples they are; None where all samples agree.
        dropped: Outputs of the other samples, without a graph; None where there are none.
        axis: Batch axis.
        generation: Of the masks; another one in a recomputed forward is an error.
    """
    indices = (None, None) if split is None else (split.kept, split.dropped)
    return _Blend.apply(x, kept, dropped, mask, *indices, axis, generation)


class _Blend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kept, dropped, mask, kept_index, dropped_index, axis, generation):
        y = dropped if kept is None else kept
        dtype = torch.promote_types(x.dtype, y.dtype)
        ctx.dtypes, ctx.axis, ctx.generation = (x.dtype, y.dtype, mask.dtype), axis, generation
        ctx.kept_index, ctx.all_kept, ctx.all_dropped = kept_index, dropped is None, kept is None
        out = (kept if ctx.all_kept else x).to(dtype, copy=True)
        if not ctx.all_kept and not ctx.all_dropped:
            out.index_copy_(axis, kept_index, kept.to(dtype))
        if ctx.needs_input_grad[3]:  # one tensor saved a block: the plain formula keeps two
            delta = torch.empty_like(out)
            if ctx.all_kept or ctx.all_dropped:
                torch.sub(y, x, out=delta)
            else:
                delta.index_copy_(axis, kept_index, kept.to(dtype))
                delta.index_copy_(axis, dropped_index, dropped.to(dtype)).sub_(x)
            ctx.save_for_backward(delta, torch.tensor(generation))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x_dtype, y_dtype, mask_dtype = ctx.dtypes
        grad_x = grad_kept = grad_mask = None
        if ctx.needs_input_grad[0]:
            if ctx.all_kept:
                grad_x = torch.zeros_like(g, dtype=x_dtype)
            elif ctx.all_dropped:
                grad_x = g.to(x_dtype)
            else:
                grad_x = g.to(x_dtype, copy=g.dtype == x_dtype).index_fill_(
                    ctx.axis, ctx.kept_index, 0
                )
        if not ctx.all_dropped and ctx.needs_input_grad[1]:
            grad_kept = (g if ctx.all_kept else g.index_select(ctx.axis, ctx.kept_index)).to(
                y_dtype
            )
        if ctx.needs_input_grad[3]:
            delta, generation = (
                ctx.saved_tensors
            )  # under activation checkpointing: those of the recomputation
            if int(generation) != ctx.generation:
                raise RuntimeError(
                    "The masks were drawn anew between a checkpointed forward pass and its backward pass. Call gates.redraw() only after "
                    "the backward pass of the batch before."
                )
            # In float32 at least: the candidates' gradients nearly cancel, and half precision would
            # leave only rounding of them.
            dtype = torch.promote_types(torch.promote_types(g.dtype, delta.dtype), torch.float32)
            parts = (t.movedim(ctx.axis, 0).flatten(1).to(dtype) for t in (g, delta))
            grad_mask = torch.einsum("nd,nd->n", *parts).to(mask_dtype)
        return grad_x, grad_kept, None, grad_mask, None, None, None, None


def with_zero_gradients(x: Tensor, tensors: list[Tensor]) -> Tensor:
    """x, through which each of `tensors` gets a gradient of zeros.

    As the plain formula gives: optimizers treat zeros and None differently, and DDP waits for them.
    """
    return _ZeroGradients.apply(x, *tensors)


class _ZeroGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *tensors):
        ctx.tensors = tensors
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g, *(
            torch.zeros_like(t) if needed else None
            for t, needed in zip(ctx.tensors, ctx.needs_input_grad[1:])
        )


@contextmanager
def without_graph(*, keep_cast_cache: bool) -> Iterator[None]:
    """No graph; and no low-precision copy of a weight that autocast would keep, graphless, for a later call with a graph."""
    cached = torch.is_autocast_cache_enabled()
    if any(
        map(torch.is_autocast_enabled, DEVICES)
    ):  # else there is none, and compiled blocks would be compiled anew for the flag
        torch.set_autocast_cache_enabled(cached and keep_cast_cache)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)
