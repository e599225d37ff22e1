"""Linear maps in place of removed runs: checked on the teacher, fitted on training samples at the start of recovery."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tinyfusion_pl.models import load_decision
from tinyfusion_pl.pruning import find_stacks
from tinyfusion_pl.pruning.run_fitting import fill_maps, fit_maps, stream_widths
from tinyfusion_pl.pruning.run_maps import attach_maps, maps_for
from tinyfusion_pl.tasks.choosing import Draws
from tinyfusion_pl.tasks.folder import Inputs, RunFolder, say

BATCH_SIZE = 32


def check_replacing(inputs: Inputs) -> dict[str, int]:
    """The width of the maps in each stack of the teacher, which is run on two samples.

    Raises:
        ValueError: when runs of its blocks cannot be replaced by linear maps.
    """
    teacher = inputs.teacher
    device = next(teacher.parameters()).device
    (call,) = calls(inputs, device, num_samples=2)
    return stream_widths(teacher, list(find_stacks(teacher)), call)


def with_replacements(student: nn.Module, folder: RunFolder, inputs: Inputs) -> nn.Module:
    """`student`, the model in ``shallow/``, with a map, zero at first, in place of each removed run."""
    decision, widths = load_decision(folder.shallow), check_replacing(inputs)
    num_blocks = {path: stack.num_blocks for path, stack in decision.stacks.items()}
    return attach_maps(student, maps_for(decision.kept_blocks, num_blocks, widths))


def fit_replacements(
    student: nn.Module, folder: RunFolder, inputs: Inputs, device: torch.device, *, num_samples: int
) -> None:
    """Fit the maps of `student` to what the removed runs of the teacher add, on samples that the seed decides."""
    kept = load_decision(folder.shallow).kept_blocks
    say(f"recover: linear maps are fitted to the removed runs of blocks on {num_samples} samples")
    teacher = copy.deepcopy(inputs.teacher).to(device).eval()
    fill_maps(
        student, kept, fit_maps(teacher, kept, calls(inputs, device, num_samples=num_samples))
    )


def calls(
    inputs: Inputs, device: torch.device, *, num_samples: int
) -> Iterator[tuple[tuple, dict[str, Any]]]:
    """Calls of the denoiser on noised training samples, a batch at a time; the global generators are left as they are."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(inputs.seed)
        draw = Draws(inputs.data, inputs.objective, device)
        batches = [
            draw(min(BATCH_SIZE, num_samples - start))
            for start in range(0, num_samples, BATCH_SIZE)
        ]
    for batch in batches:
        yield batch.args, batch.kwargs
