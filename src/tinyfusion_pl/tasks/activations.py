"""Histograms of hidden states at the layer pairs of teacher and student (TinyFusion, figure 8)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tinyfusion_pl.artifacts import write_json
from tinyfusion_pl.data import GenerationDataModule
from tinyfusion_pl.distill import HiddenStates
from tinyfusion_pl.models import load_decision, load_shallow
from tinyfusion_pl.objectives.base import Objective
from tinyfusion_pl.pruning import get_stack
from tinyfusion_pl.report import write_activations
from tinyfusion_pl.tasks.choosing import Draws
from tinyfusion_pl.tasks.folder import say

RESULT, FIGURE = "activations.json", "activations.png"
NUM_BINS = 200


@dataclass(kw_only=True)
class Activations:
    """Settings of the histograms.

    Args:
        student: Folder of a shallow model (``recovered/`` of a run, or ``shallow/``).
        num_samples: Draws of the training data, >= 1.
        num_sigma: Multiples of the standard deviation to mark, each > 0.
    """

    student: str
    num_samples: int = 64
    num_sigma: Sequence[float] = (2.0, 4.0)

    def __post_init__(self) -> None:
        if self.num_samples < 1 or not all(k > 0 for k in self.num_sigma):
            raise ValueError(
                f"num_samples is {self.num_samples} and num_sigma {list(self.num_sigma)}; give "
                "values > 0."
            )


@torch.no_grad()
def draw_activations(
    *,
    run_dir: str | Path,
    name: str,
    seed: int,
    teacher: nn.Module,
    objective: Objective,
    data: GenerationDataModule,
    activations: Activations,
    begin: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Compare the hidden states of `teacher` and of a shallow student on the same draws.

    Writes ``activations.png`` and ``activations.json``: for each layer pair and side mean, sigma,
    largest magnitude, its multiple of sigma, and the share of values beyond each k sigma, over all
    samples. `begin` is called once all checks have passed.

    Raises:
        ValueError: for a student that was not pruned from this teacher.
        ArtifactError: for a student that cannot be read.
    """
    student, decision = load_shallow(activations.student), load_decision(activations.student)
    data.check_fits(teacher)
    for path, stack in decision.stacks.items():
        widths = [getattr(model, "width", None) for model in (student, teacher)]
        if (depth := len(get_stack(teacher, path))) != stack.num_blocks or widths[0] != widths[1]:
            raise ValueError(
                f"{activations.student} was pruned from a model with {stack.num_blocks} blocks in "
                f"'{path}', but the teacher has {depth}; their hidden states have {widths[0]} and "
                f"{widths[1]} channels. Give the teacher that it was pruned from (model=, "
                "model.checkpoint=)."
            )
    pairs = {path: stack.layer_pairs() for path, stack in decision.stacks.items()}
    if begin is not None:
        begin()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        call = Draws(data, objective, next(teacher.parameters()).device)(activations.num_samples)
    found: dict[str, dict[str, Tensor]] = {}
    for path, of_path in pairs.items():
        models = {
            "teacher": (teacher, [t for _, t in of_path]),
            "student": (student, [s for s, _ in of_path]),
        }
        states = {
            side: _states(model.eval(), path, blocks, call)
            for side, (model, blocks) in models.items()
        }
        for s, t in of_path:
            pair = f"{path}: block {t} of the teacher, {s} of the student"
            found[pair] = {"teacher": states["teacher"][t], "student": states["student"][s]}
    result, histograms = {}, {}
    for pair, sides in found.items():
        result[pair] = {
            side: _statistics(values, activations.num_sigma) for side, values in sides.items()
        }
        histograms[pair] = {
            side: np.histogram(values.numpy(), bins=NUM_BINS) for side, values in sides.items()
        }
    write_json(Path(run_dir) / RESULT, result)
    figure = write_activations(
        Path(run_dir) / FIGURE, histograms, result, num_sigma=activations.num_sigma
    )
    for pair, sides in result.items():
        say(
            f"{pair}: largest magnitude {sides['teacher']['largest_in_sigma']:.1f} sigma, "
            f"{sides['student']['largest_in_sigma']:.1f} sigma"
        )
    say(f"Done. Open {figure}")
    return result


def _states(model: nn.Module, path: str, blocks: Sequence[int], call: Any) -> dict[int, Tensor]:
    """Hidden states after each block, of all streams together, as one vector."""
    with HiddenStates(model, path, blocks) as hidden:
        model(*call.args, **call.kwargs)
    return {
        block: torch.cat(
            [
                each.float().flatten().cpu()
                for each in (states if isinstance(states, tuple) else (states,))
            ]
        )
        for block, states in hidden.items()
    }


def _statistics(values: Tensor, num_sigma: Sequence[float]) -> dict[str, Any]:
    sigma, mean = (float(each) for each in torch.std_mean(values))
    largest = float((values - mean).abs().max())
    beyond = {str(k): float(((values - mean).abs() >= k * sigma).float().mean()) for k in num_sigma}
    return {
        "mean": mean,
        "sigma": sigma,
        "largest": largest,
        "largest_in_sigma": largest / max(sigma, 1e-12),
        "share_beyond": beyond,
    }
