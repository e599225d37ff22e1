"""Measure steps of a small DiT and compare with `cost_model`: FLOPs by torch's counter, bytes by
tensors.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from cost_model import Step, step_bytes, step_flops
from gated_blocks import SavedBytes
from model_sizes import dit
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tinyfusion_pl import create_model
from tinyfusion_pl.distill import Distillation
from tinyfusion_pl.objectives import GaussianDiffusion
from tinyfusion_pl.pruning import DepthGates, WeightUpdate, remove_blocks

SIZES = {"depth": 8, "width": 128, "tokens": 64, "channels": 4, "classes": 10}
BATCH = 8


def small() -> torch.nn.Module:
    """A DiT of `SIZES`, its blocks no longer the identity that they start as."""
    torch.manual_seed(0)
    model = create_model(
        "dit_digits",
        depth=SIZES["depth"],
        hidden_size=SIZES["width"],
        num_heads=4,
        patch_size=2,
        in_channels=SIZES["channels"],
        input_size=16,
        num_classes=SIZES["classes"],
    )
    for block in model.blocks:
        torch.nn.init.normal_(block.adaLN_modulation[1].weight, std=0.02)
    return model.train()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(BATCH, SIZES["channels"], 16, 16), torch.zeros(BATCH, dtype=torch.long)


def search_loss(update: str, *, gather: bool) -> tuple[torch.nn.Module, torch.Tensor]:
    """The loss of a search step in which each block is kept by half of the samples."""
    model, objective = small(), GaussianDiffusion()
    WeightUpdate(update).start(model)
    gates = DepthGates(model, "1:2", tau=1.0)
    gates.gather = gather
    # Candidates of each group in turn, so that exactly half of the samples keep each block.
    turns = torch.arange(BATCH) % 2
    gates.fix_noise(
        {
            "blocks": [
                50.0 * torch.nn.functional.one_hot(turns, 2).float() for _ in gates.stacks[0].logits
            ]
        }
    )
    gates.redraw()
    x, y = batch()
    draw = objective.draw(x)
    model(draw.x_t, draw.t, y)  # the first call finds out how a block's batch is divided
    return model, lambda: objective.losses(model(draw.x_t, draw.t, y), draw)["loss"].mean()


def recovery_loss():
    """The loss of a recovery step of half the blocks."""
    teacher, objective = small().eval().requires_grad_(False), GaussianDiffusion()
    student = remove_blocks(small(), {"blocks": list(range(0, SIZES["depth"], 2))}).train()
    x, y = batch()
    draw, distill = objective.draw(x), Distillation(weight_feature=0.0)
    return student, lambda: distill.losses(
        student, teacher, objective, draw, y, pairs={}, feature_weight=0.0
    )["loss"].mean()


def flops_of(loss) -> int:
    # The counter does not know the CPU's flash attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss().backward()
    return counter.get_total_flops()


def saved_by(model, loss, *, mixed: bool) -> int:
    with SavedBytes(model) as counter, torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        kept = loss()
    del kept
    return counter.total


def cases() -> Iterator[tuple[str, float, float]]:
    """(what, predicted, measured)"""
    predicted = dit("small", **SIZES)
    for update, gather in (("full", False), ("full", True), ("lora", True)):
        model, loss = search_loss(update, gather=gather)
        step = Step("search", BATCH, update=update, gather=gather, mixed=False)
        name = f"search, {update}, {'gathered' if gather else 'plain'}"
        yield f"{name}: FLOPs", step_flops(predicted, step), flops_of(loss)
        if update == "full":
            yield (
                f"{name}: bytes",
                step_bytes(predicted, step)["activations"],
                saved_by(model, loss, mixed=False),
            )
    model, loss = recovery_loss()
    yield "recovery: FLOPs", step_flops(predicted, Step("recovery", BATCH)), flops_of(loss)
    for mixed in (False, True):
        step = Step("recovery", BATCH, mixed=mixed)
        yield (
            f"recovery, {'bf16' if mixed else 'float32'}: bytes",
            step_bytes(predicted, step)["activations"],
            saved_by(model, loss, mixed=mixed),
        )
    whole = small()
    yield "parameters", predicted.params(), sum(p.numel() for p in whole.parameters())
