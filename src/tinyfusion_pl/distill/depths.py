"""One training, many depths: a student takes the teacher's runs back without training.

After interval distillation (PPCL, arXiv 2511.16156) each kept block maps what goes into a run of
the teacher's blocks to what comes out. So any of them can be exchanged for that run, and each
number of exchanges is a model of a depth between the student's and the teacher's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tinyfusion_pl.distill.interval_losses import TeacherRuns, interval_losses
from tinyfusion_pl.distill.intervals import resolve_intervals
from tinyfusion_pl.distill.outputs import output_loss
from tinyfusion_pl.distill.pairs import resolve_path
from tinyfusion_pl.pruning import Decision, GroupDecision, StackDecision, get_stack, remove_blocks
from tinyfusion_pl.pruning.blocks import split_path
from tinyfusion_pl.pruning.calls import quiet
from tinyfusion_pl.pruning.run_maps import copy_maps

CRITERION = "intervals"  # in the record of a model that took runs back
Calls = Sequence[tuple[tuple, Mapping[str, Any]]]  # positional and keyword arguments of a model
Place = tuple[str, int]  # stack path, and the kept block by its place in the student


@dataclass
class Depth:
    """A model of one depth.

    Attributes:
        model: The student with `restored` runs, in evaluation mode.
        decision: Its kept blocks; `save_shallow` records ``decision.as_dict()`` as ``stacks``.
        depth: Blocks in all its stacks.
        restored: The runs that it took back, by stack path and the student's block that stood for
            each.
        distance: Mean squared error of its output to the teacher's, averaged over the calls.
    """

    model: nn.Module
    decision: Decision
    depth: int
    restored: tuple[Place, ...]
    distance: float


@torch.no_grad()
def interval_order(
    student: nn.Module, teacher: nn.Module, decision: Decision, calls: Calls
) -> list[tuple[Place, float]]:
    """Runs with removed blocks, by interval loss, largest first.

    See `interval_losses`; averaged over samples and calls.

    Args:
        student: The shallow model.
        teacher: The dense model.
        decision: The decision that the student came from.
        calls: ``(args, kwargs)`` of the models, on their device.
    """
    intervals = resolve_intervals(decision, student, teacher)
    total: dict[Place, float] = {
        (path, i.block): 0.0 for path, each in intervals.items() for i in each if i.num_blocks > 1
    }
    with quiet(student), quiet(teacher), TeacherRuns(teacher, intervals) as runs:
        for args, kwargs in calls:
            runs.start()
            teacher(*args, **kwargs)
            for path, losses in interval_losses(student, runs.take(), intervals).items():
                for block, loss in enumerate(losses.mean(1).tolist()):
                    if (path, block) in total:
                        total[path, block] += loss / len(calls)
    return sorted(total.items(), key=lambda item: -item[1])


def restore(
    student: nn.Module, teacher: nn.Module, decision: Decision, places: Iterable[Place]
) -> tuple[nn.Module, Decision]:
    """Copy `student` with the teacher's runs in place of the blocks at `places`.

    Returns the model and its decision.

    Args:
        student: The shallow model, trained or not; it is copied, not changed.
        teacher: The dense model, likewise.
        decision: The decision that the student came from.
        places: Stack path, and the place of the block in the student, of each run.

    Raises:
        ValueError: for a place that is not there, or a decision of other models.
    """
    intervals, places = resolve_intervals(decision, student, teacher), set(places)
    if unknown := [
        place for place in places if not 0 <= place[1] < len(intervals.get(place[0], ()))
    ]:
        raise ValueError(
            f"There is no kept block {unknown[0]}; the student has "
            f"{ ({p: len(each) for p, each in intervals.items()}) }."
        )
    decided = {
        resolve_path(path, student, "", None): stack for path, stack in decision.stacks.items()
    }
    kept, sources = {}, {}
    for path, each in intervals.items():
        # The teacher's blocks, and for those whose weights are the student's the place in it.
        entries: list[tuple[int, int | None]] = []
        for interval, block in zip(each, decided[path].kept_blocks):
            if (path, interval.block) in places:
                entries += [(i, None) for i in range(interval.first, interval.last + 1)]
            else:
                entries.append((block, interval.block))
        kept[path], sources[path] = [i for i, _ in entries], [source for _, source in entries]
    model = remove_blocks(copy.deepcopy(teacher), kept).requires_grad_()
    for path, of_path in sources.items():
        for module, source in zip(get_stack(model, path), of_path):
            if source is not None:
                copy_maps(get_stack(student, path)[source], module)
                module.load_state_dict(get_stack(student, path)[source].state_dict())
    _copy_rest(student, model, kept)
    stacks = {
        path: stack if kept[path] == stack.kept_blocks else _with_blocks(stack, kept[path])
        for path, stack in decided.items()
    }
    return model.eval(), Decision(stacks)


def depths(
    student: nn.Module, teacher: nn.Module, decision: Decision, calls: Calls
) -> Iterator[Depth]:
    """Models of growing depth, from the student to all blocks of the teacher.

    Each takes back one more run, in the order of `interval_order`.

    The last one has all blocks of the teacher, with the student's weights where no run was ever
    removed.

    Args:
        student: The shallow model.
        teacher: The dense model.
        decision: The decision that the student came from.
        calls: ``(args, kwargs)`` of the models, of equal batch sizes, on their device.

    Example::

        for each in depths(student, teacher, decision, calls):
            print(each.depth, each.distance)
            save_shallow(f"depth_{each.depth}", each.model, {"stacks": each.decision.as_dict()})
    """
    order = [place for place, _ in interval_order(student, teacher, decision, calls)]
    answers = [_ask(teacher, call) for call in calls]
    for num in range(len(order) + 1):
        restored = tuple(order[:num])
        model, new = restore(student, teacher, decision, restored)
        distance = sum(
            float(output_loss(_ask(model, call), answer)) for call, answer in zip(calls, answers)
        ) / len(calls)
        yield Depth(model, new, sum(map(len, new.kept_blocks.values())), restored, distance)


@torch.no_grad()
def _ask(model: nn.Module, call: tuple[tuple, Mapping[str, Any]]) -> Any:
    with quiet(model):
        return model(*call[0], **call[1])


def _copy_rest(student: nn.Module, model: nn.Module, paths: Iterable[str]) -> None:
    """Give `model` what `student` has outside the stacks at `paths`."""
    prefixes = []
    for path in paths:
        owner, names = split_path(path)
        prefixes += [f"{owner}.{name}." if owner else f"{name}." for name in names.split("+")]
    inside = tuple(prefixes)
    theirs = {
        key: value for key, value in student.state_dict().items() if not key.startswith(inside)
    }
    model.load_state_dict({**model.state_dict(), **theirs})
    own = dict(model.named_parameters())
    for name, parameter in student.named_parameters():
        if not name.startswith(inside):
            own[name].requires_grad_(parameter.requires_grad)


def _with_blocks(stack: StackDecision, kept: list[int]) -> StackDecision:
    """The decision of a stack that took runs back."""
    group = GroupDecision(start=0, num_kept=len(kept), num_blocks=stack.num_blocks, kept=list(kept))
    return StackDecision(
        pattern=f"{len(kept)}:{stack.num_blocks}",
        num_blocks=stack.num_blocks,
        kept_blocks=list(kept),
        block_probabilities=[],
        groups=[group],
        criterion=CRITERION,
    )
