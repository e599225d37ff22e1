"""Linear maps for removed runs of blocks, fitted at the start of recovery."""

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
    """Width of the maps in each stack of the teacher, found by running it on two samples.

    Raises:
        ValueError: if runs of its blocks cannot be replaced by linear maps.
    """
    teacher = inputs.teacher
    device = next(teacher.parameters()).device
    (call,) = calls(inputs, device, num_samples=2)
    return stream_widths(teacher, list(find_stacks(teacher)), call)


def with_replacements(student: nn.Module, folder: RunFolder, inputs: Inputs) -> nn.Module:
    """`student`, the model in ``shallow/``, with a zero map for each removed run."""
    decision, widths = load_decision(folder.shallow), check_replacing(inputs)
    num_blocks = {path: stack.num_blocks for path, stack in decision.stacks.items()}
    return attach_maps(student, maps_for(decision.kept_blocks, num_blocks, widths))


def fit_replacements(
    student: nn.Module, folder: RunFolder, inputs: Inputs, device: torch.device, *, num_samples: int
) -> None:
    """Fit the maps of `student` to the output of the teacher's removed runs, on seeded samples."""
    kept = load_decision(folder.shallow).kept_blocks
    say(f"recover: fitting linear maps to the removed runs of blocks on {num_samples} samples")
    teacher = copy.deepcopy(inputs.teacher).to(device).eval()
    fill_maps(
        student, kept, fit_maps(teacher, kept, calls(inputs, device, num_samples=num_samples))
    )


def calls(
    inputs: Inputs, device: torch.device, *, num_samples: int
) -> Iterator[tuple[tuple, dict[str, Any]]]:
    """Calls of the denoiser on batches of noised training samples; keeps the global generators."""
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
