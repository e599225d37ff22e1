"""The gradients of one block with its samples gathered, held against those of the plain formula."""

from __future__ import annotations

import torch
from torch import Tensor

from tinyfusion_pl.pruning.calls import Call, quiet
from tinyfusion_pl.pruning.gating import GatedForward
from tinyfusion_pl.pruning.masks import Split


def check_gradients(gated: GatedForward, call: Call) -> None:
    """The gradients of one block, half of the samples dropped: gathered against the plain formula."""
    plan = gated.plan(call)
    num_samples = call.tensors[plan.streams.names[0]].shape[plan.axis]
    if plan.plain_because or num_samples < 2:
        return
    first = call.tensors[plan.streams.names[0]]
    bits = torch.arange(num_samples, device=first.device) % 2 == 0
    split = Split(int(bits.sum()), bits.nonzero().flatten(), (~bits).nonzero().flatten())
    results = []
    with quiet(gated.block, seed=0), torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        leaves = {n: call.tensors[n].detach().clone().requires_grad_() for n in plan.streams.names}
        args, kwargs = call.replace(leaves)
        mask = bits.to(torch.float32).requires_grad_()
        parameters = [p for p in gated.block.parameters() if p.requires_grad]
        for way in (split, None):
            # Streams as they come out of another block: no leaves, which a block could not write
            # into.
            copies = {n: leaf.view_as(leaf) for n, leaf in leaves.items()}
            again = (
                Call(gated.signature, *call.replace(copies))
                if plan.writes_streams
                else Call(gated.signature, args, kwargs)
            )
            y = plan.streams.take(gated.gate(again, plan, mask, way))
            loss = sum(_weighted_sum(each) for each in y.values())
            wanted = [mask, *leaves.values(), *parameters]
            grads = torch.autograd.grad(loss, wanted, allow_unused=True)
            results.append([torch.zeros_like(w) if g is None else g for w, g in zip(wanted, grads)])
    device = first.device.type
    computed = (
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float64
    )
    sizes = [plain.float().abs().max().item() if plain.numel() else 0.0 for plain in results[1]]
    for ours, plain, size in zip(*results, sizes):
        eps = max(
            torch.finfo(dtype).eps for dtype in (plain.dtype, computed)
        )  # the coarser one rounds
        # A gradient that is zero but for rounding (a bias of attention's keys) is as exact as the
        # others are large.
        allowed = max(size * max(1e-2, 100 * eps), max(sizes) * max(1e-4, 10 * eps), 1e-8)
        if plain.numel() and (ours.float() - plain.float()).abs().max().item() > allowed:
            raise ValueError(f"Block {gated.name}: gradients with its samples gathered differ from those of the plain formula. Pass "
                             "gather=False, which computes the plain formula throughout.")  # fmt: skip


def _weighted_sum(tensor: Tensor) -> Tensor:
    """A scalar whose gradient differs at every place."""
    return (
        tensor.float().flatten() * torch.arange(tensor.numel(), device=tensor.device).sin()
    ).sum()
