"""Block selection by a criterion instead of mask learning; saves the shallow model."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.loggers import Logger
from torch import Tensor

from tinyfusion_pl.artifacts import write_json, write_text
from tinyfusion_pl.callbacks import gate_metrics
from tinyfusion_pl.checksums import Origin
from tinyfusion_pl.models import save_shallow
from tinyfusion_pl.pruning import remove_blocks
from tinyfusion_pl.selection import Calibration, Selected, Selection, WidthPruning
from tinyfusion_pl.selection.progress import Progress
from tinyfusion_pl.tasks.folder import Inputs, RunFolder, say
from tinyfusion_pl.tasks.loggers import StepLogger
from tinyfusion_pl.tasks.tracking import stage_loggers

DECISIONS, SELECTION, PROGRESS = (
    "learn_mask/decisions.jsonl",
    "learn_mask/selection.json",
    "learn_mask/progress.pt",
)


class Draws:
    """Draws samples of a data module, noised by an objective, with the global generator."""

    def __init__(self, data: LightningDataModule, objective: Any, device: torch.device) -> None:
        self.dataset, self.objective, self.device = data.train_set(), objective, device
        self.takes_draws = getattr(self.dataset, "takes_draws", False)

    def __call__(self, num_samples: int) -> Calibration:
        """Draw `num_samples` samples."""
        indices = torch.randint(len(self.dataset), (num_samples,)).tolist()
        draws = torch.randint(2**31, (num_samples,)).tolist()
        keys = list(zip(draws, indices)) if self.takes_draws else indices
        items = (
            self.dataset.__getitems__(keys)
            if hasattr(self.dataset, "__getitems__")
            else [self.dataset[key] for key in keys]
        )
        x, y = (torch.stack([torch.as_tensor(part) for part in parts]) for parts in zip(*items))
        return self._calibration(x, y)

    def _calibration(self, x: Tensor, y: Tensor) -> Calibration:
        return Calibration.of(self.objective, x.to(self.device), y.to(self.device))


def choose(
    selection: Selection | WidthPruning, folder: RunFolder, inputs: Inputs, device: torch.device, *,
    made_from: Origin,
    logger: Callable[..., Logger] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Select blocks, prune a copy of the teacher and save it to ``shallow/``.

    The steps of a search are logged like those of mask learning: ``search/loss`` (mean log of the
    distance to the teacher), ``gates/entropy``, ``gates/confidence``, and for each block its
    probability and whether it is kept.

    Args:
        selection: The criterion and its budget, or width pruning.
        folder: The run.
        inputs: The teacher, objective and data.
        device: Device of the computation.
        made_from: Origin of the selection; an interrupted one of the same origin resumes.
        logger: Factory of the stage's logger, see `Fit.logger`.

    Returns:
        The result of the stage.
    """
    start = time.perf_counter()
    name = selection.name
    say(f"learn_mask: selecting blocks by {name}; saving the shallow model to {folder.shallow}")
    model = copy.deepcopy(inputs.teacher).to(device).eval()
    loggers = stage_loggers(logger, folder / "logs" / "learn_mask", "learn_mask")
    for each in loggers:
        if isinstance(each, StepLogger):
            each.drop_after(0)  # a resumed search reports all its steps again

    def watch(entry: dict[str, Any]) -> None:
        metrics = {"search/loss": entry["loss"], **gate_metrics(entry["decision"])}
        for each in loggers:
            each.log_metrics(metrics, step=entry["step"])

    progress = Progress(
        folder / PROGRESS, made_from={**made_from, "seed": inputs.seed, "criterion": name}
    )
    given = {} if isinstance(selection, WidthPruning) else {"progress": progress}
    found = selection(
        model, Draws(inputs.data, inputs.objective, device), seed=inputs.seed, watch=watch, **given
    )
    for each in loggers:
        each.finalize("success")
    kept = found.decision.kept_blocks
    shallow = (
        remove_blocks(copy.deepcopy(inputs.teacher), kept)
        if found.shallow is None
        else found.shallow
    )
    save_shallow(folder.shallow, shallow, {
        "stacks": found.decision.as_dict(), "source": dict(getattr(inputs.teacher, "source", None)
        or {}), "model_factory": None, "configuration": {"criterion": name, "num_block_runs":
        found.num_block_runs}, "seed": inputs.seed, **({} if found.width is None else {"width":
        found.width}),
    })  # fmt: skip
    _write(folder, found, name)
    progress.delete()
    if (width := found.width) is not None:
        say(
            f"learn_mask: {name} reduced the width from {width['dense_hidden_size']} to "
            f"{width['hidden_size']} channels and removed {width['removed']:.1%} of the parameters"
        )
    say(
        f"learn_mask: {name} kept {describe_kept(kept)} (cost: {found.num_block_runs:,} block "
        "evaluations)"
    )
    return {
        "seconds": time.perf_counter() - start,
        "kept_blocks": kept,
        "criterion": name,
        "num_block_runs": found.num_block_runs,
    }


def describe_kept(kept: Mapping[str, Sequence[int]]) -> str:
    """The kept blocks of each stack: ``blocks 0, 2, 5``."""
    return "; ".join(f"{path} {', '.join(map(str, blocks))}" for path, blocks in kept.items())


def _write(folder: RunFolder, found: Selected, name: str) -> None:
    """Write what the report shows of the selection."""
    (folder / DECISIONS).parent.mkdir(parents=True, exist_ok=True)
    if found.history:
        lines = [
            {"step": each["step"], "loss": each["loss"], "stacks": each["decision"].telemetry()}
            for each in found.history
        ]
        write_text(folder / DECISIONS, "".join(json.dumps(line) + "\n" for line in lines))
    rounds = [
        [
            {
                "kept_units": each["structure"].nonzero().flatten().tolist(),
                "distance": each["distance"],
            }
            for each in candidates
        ]
        for candidates in found.rounds
    ]
    width = {} if found.width is None else {"width": {**found.width, "intervals": found.intervals}}
    write_json(
        folder / SELECTION,
        {
            "criterion": name,
            "kept_blocks": found.decision.kept_blocks,
            "num_block_runs": found.num_block_runs,
            "shortgpt": found.simple_rule,
            "scores": {path: stack.scores for path, stack in found.decision.stacks.items()},
            "rounds": rounds,
            **width,
        },
    )
