"""One run, many depths: quality over depth of a student that takes runs of the teacher's blocks back (PPCL, arXiv 2511.16156)."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import nn

from tinyfusion_pl.artifacts import write_text
from tinyfusion_pl.distill import depths
from tinyfusion_pl.models import load_decision, load_shallow, save_shallow
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
    """What is measured.

    Args:
        student: Folder of a recovered model (``recovered/`` of a run), best one that was recovered by
            ``distill=interval``: only then does each of its blocks map what enters a run of the
            teacher's blocks to what leaves it.
        num_samples: Draws of the training data by which the order of the runs is decided, >= 1.
    """

    student: str
    num_samples: int = 128

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"depth_curve.num_samples is {self.num_samples}; give 1 or more.")


def measure_depths(
    *,
    run_dir: str | Path,
    name: str,
    seed: int,
    teacher: nn.Module,
    objective: Any,
    data: LightningDataModule,
    depth_curve: DepthCurve,
    evaluate: Evaluate,
    begin: Callable[[], None] | None = None,
) -> None:
    """Put the teacher's runs back one at a time, without training, and evaluate the model of each depth.

    Leaves ``depths/<depth>/`` (shallow folders), ``metrics.json`` (as an evaluation leaves it),
    ``depth_curve.csv`` and ``depth_curve.png``. The run whose interval loss is largest goes back
    first. `begin` is called when all checks have passed.

    Raises:
        ValueError, ArtifactError: for a student that was not cut from this teacher, or a setting of
            the evaluation that does not fit.
    """
    if evaluate.models:
        raise ValueError(
            f"evaluate.models names {', '.join(evaluate.models)}, but the models of a depth curve are those of "
            "depth_curve.student. Leave evaluate.models empty."
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
    """Raise a ValueError unless `student` was cut from a model like `teacher`."""
    for stack_path, stack in decision.stacks.items():
        depth, widths = (
            len(get_stack(teacher, stack_path)),
            [getattr(model, "width", None) for model in (student, teacher)],
        )
        if depth != stack.num_blocks or widths[0] != widths[1]:
            raise ValueError(
                f"{path} was cut from a model of {stack.num_blocks} blocks in '{stack_path}', and the teacher has {depth}; hidden "
                f"states have {widths[0]} and {widths[1]} channels. Give the teacher that it was cut from (model=, model.checkpoint=)."
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
