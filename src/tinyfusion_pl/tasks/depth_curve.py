"""Quality over depth of a student that restores runs of the teacher's blocks (PPCL, 2511.16156)."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tinyfusion_pl.artifacts import write_text
from tinyfusion_pl.data import GenerationDataModule
from tinyfusion_pl.distill import depths
from tinyfusion_pl.models import load_decision, load_shallow, save_shallow
from tinyfusion_pl.objectives.base import Objective
from tinyfusion_pl.pruning import Decision, get_stack
from tinyfusion_pl.report import write_depth_curve
from tinyfusion_pl.report.reading import read_metrics
from tinyfusion_pl.tasks.choosing import Draws
from tinyfusion_pl.tasks.evaluate import Evaluate
from tinyfusion_pl.tasks.folder import Inputs, RunFolder, say
from tinyfusion_pl.tasks.results import METRICS

CURVE, FIGURE = "depth_curve.csv", "depth_curve.png"
COLUMNS = (
    "depth",
    "num_params",
    "teacher_distance",
    "fid",
    "sfid",
    "inception_score",
    "precision",
    "recall",
    "accuracy",
)


@dataclass(kw_only=True)
class DepthCurve:
    """Settings of a depth curve.

    Args:
        student: Folder of a recovered model (``recovered/`` of a run), preferably recovered with
            ``distill=interval``: only then does each block map the input of a run of the teacher's
            blocks to its output.
        num_samples: Draws of the training data that determine the order of the runs, >= 1.
    """

    student: str
    num_samples: int = 128

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"depth_curve.num_samples is {self.num_samples}; give a count >= 1.")


def measure_depths(
    *,
    run_dir: str | Path,
    name: str,
    seed: int,
    teacher: nn.Module,
    objective: Objective,
    data: GenerationDataModule,
    depth_curve: DepthCurve,
    evaluate: Evaluate,
    begin: Callable[[], None] | None = None,
) -> None:
    """Restore the teacher's runs one at a time, without training, and evaluate each depth.

    Writes ``depths/<depth>/`` (shallow folders), ``metrics.json`` (see `Evaluate`),
    ``depth_curve.csv`` and ``depth_curve.png``. The run with the largest interval loss is restored
    first. `begin` is called once all checks have passed.

    Raises:
        ValueError: for a student that was not pruned from this teacher, or an invalid setting of
        the
            evaluation.
        ArtifactError: for a student that cannot be read.
    """
    if evaluate.models:
        raise ValueError(
            f"evaluate.models is {', '.join(evaluate.models)}, but a depth curve evaluates the "
            "models of depth_curve.student. Leave evaluate.models empty."
        )
    student, decision = load_shallow(depth_curve.student), load_decision(depth_curve.student)
    _check(depth_curve.student, student, decision, teacher)
    inputs = Inputs(name=name, seed=seed, teacher=teacher, objective=objective, data=data)
    data.check_fits(teacher)
    objective.check_fits(teacher)
    evaluate.check(inputs)
    if begin is not None:
        begin()
    folder = RunFolder(run_dir)
    models = dict(
        _restored(folder, inputs, student, decision, depth_curve.num_samples, evaluate.device)
    )
    measured = dataclasses.replace(
        evaluate, models=models, num_timing_rounds=0, num_draws=evaluate.num_draws or 2048
    )
    measured.run(folder, inputs)
    results = read_metrics(folder / METRICS)
    rows = [results[each] for each in models]
    columns = [column for column in COLUMNS if any(column in row for row in rows)]
    write_text(folder / CURVE, _csv(columns, rows))
    figure = write_depth_curve(folder / FIGURE, rows)
    for row in rows:
        say(
            f"{row['depth']} blocks: "
            + ", ".join(f"{column} {row[column]:.4g}" for column in columns[2:4] if column in row)
        )
    say(f"Done. Open {figure}")


def _check(path: str, student: nn.Module, decision: Decision, teacher: nn.Module) -> None:
    """Raise a ValueError unless `student` was pruned from a model like `teacher`."""
    for stack_path, stack in decision.stacks.items():
        depth = len(get_stack(teacher, stack_path))
        widths = [getattr(model, "width", None) for model in (student, teacher)]
        if depth != stack.num_blocks or widths[0] != widths[1]:
            raise ValueError(
                f"{path} was pruned from a model with {stack.num_blocks} blocks in '{stack_path}', "
                f"but the teacher has {depth}; their hidden states have {widths[0]} and "
                f"{widths[1]} channels. Give the teacher that it was pruned from (model=, "
                "model.checkpoint=)."
            )


def _restored(
    folder: RunFolder,
    inputs: Inputs,
    student: nn.Module,
    decision: Decision,
    num_samples: int,
    device: torch.device,
) -> Iterator[tuple[str, str]]:
    """Name and folder of the model of each depth, the student first."""
    teacher = inputs.teacher.to(device).eval()
    with torch.random.fork_rng():
        torch.manual_seed(inputs.seed)
        call = Draws(inputs.data, inputs.objective, device)(num_samples)
    for each in depths(student.to(device).eval(), teacher, decision, [(call.args, call.kwargs)]):
        path = folder / "depths" / str(each.depth)
        restored = ", ".join(f"{stack} {block}" for stack, block in each.restored) or "none"
        save_shallow(
            path,
            each.model.cpu(),
            {
                "stacks": each.decision.as_dict(),
                "configuration": {"restored": restored},
                "seed": inputs.seed,
            },
        )
        yield f"depth_{each.depth}", str(path)


def _csv(columns: list[str], rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(
        [repr(row[column]) if column in row else "" for column in columns] for row in rows
    )
    return text.getvalue()
