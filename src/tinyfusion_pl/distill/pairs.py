"""Layer pairs: which block of the student learns from which block of the teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from tinyfusion_pl.pruning import Decision, StackDecision, get_stack
from tinyfusion_pl.pruning.blocks import walk_modules

Pairs = Mapping[str, Sequence[tuple[int, int]]]


def check_pairs(pairs: Pairs, student: nn.Module, teacher: nn.Module) -> None:
    """Raise ValueError unless each (student block, teacher block) of `pairs` exists."""
    for path, of_path in pairs.items():
        sizes = len(get_stack(student, path)), len(get_stack(teacher, path))
        for pair in of_path:
            if len(pair) != 2 or not all(0 <= index < size for index, size in zip(pair, sizes)):
                raise ValueError(
                    f"Layer pair {list(pair)} of '{path}' does not fit: a pair is (student block "
                    f"0..{sizes[0] - 1}, teacher block 0..{sizes[1] - 1})."
                )


def resolve_pairs(
    given: Pairs | Decision,
    student: nn.Module,
    teacher: nn.Module,
    *,
    module: str = "",
    owner: nn.Module | None = None,
) -> dict[str, list[tuple[int, int]]]:
    """Pairs by stack path in `student`, whichever module the given paths start from.

    Args:
        given: Pairs by stack path, or the decision that the student came from.
        student: The shallow model.
        teacher: The dense model.
        module: Path of the student in `owner`; paths may begin with it, or with the last parts of
            it.
        owner: The module that holds the student. Stacks that are in its other parts are left out.

    Raises:
        ValueError: when a path is none or more than one of the student's stacks, the depths are not
            those of the decision, or a pair does not fit.
    """
    pairs: dict[str, list[tuple[int, int]]] = {}
    for path in given.stacks if isinstance(given, Decision) else given:
        if (inside := resolve_path(path, student, module, owner)) is None:
            continue
        pairs[inside] = (
            [tuple(pair) for pair in given[path]]
            if not isinstance(given, Decision)
            else given.stacks[path].layer_pairs()
        )
        if isinstance(given, Decision):
            check_decision(given.stacks[path], inside, student, teacher)
    if not pairs:
        raise ValueError(
            f"None of {list(given.stacks if isinstance(given, Decision) else given)} is a stack "
            f"of '{module}', the student."
        )
    check_pairs(pairs, student, teacher)
    return pairs


def check_decision(stack: StackDecision, path: str, student: nn.Module, teacher: nn.Module) -> None:
    """Raise ValueError unless the depths of `teacher` and `student` match the decision."""
    depths = len(get_stack(student, path)), len(get_stack(teacher, path))
    if depths != (len(stack.kept_blocks), stack.num_blocks):
        raise ValueError(
            f"The decision keeps {len(stack.kept_blocks)} of {stack.num_blocks} blocks of "
            f"'{path}', but there the student has {depths[0]} blocks and the teacher {depths[1]}. "
            "Give the dense model as teacher, the shallow one as student, and their decision."
        )


def resolve_path(path: str, student: nn.Module, module: str, owner: nn.Module | None) -> str | None:
    """The path of the stack in `student`; None for one in another part of `owner`."""
    parts = module.split(".") if module else []
    plain = ".".join(part for part in path.split(".") if part != "_orig_mod")
    heads = ["", *(".".join(parts[i:]) + "." for i in range(len(parts)))]
    candidates = {plain.removeprefix(head) for head in heads if plain.startswith(head)}
    fitting = sorted(each for each in candidates if _has_stack(student, each))
    if not fitting:  # the paths begin further inside
        joined = "+" in plain
        lists = [
            name
            for name, m in walk_modules(student)
            if isinstance(m, (nn.ModuleList, nn.Sequential))
        ]
        fitting = [] if joined else [name for name in lists if name.endswith(f".{plain}")]
    if len(fitting) > 1:
        raise ValueError(
            f"'{path}' may be any of the stacks {fitting} of the student '{module}'. Give pairs= "
            "with the paths of the stacks in the student."
        )
    if fitting:
        return fitting[0]
    if (
        owner is not None
        and not any(plain.startswith(head) for head in heads[1:])
        and _has_stack(owner, plain)
    ):
        return None
    get_stack(student, plain)  # raises, and names the lists that are there
    return None


def _has_stack(model: nn.Module, path: str) -> bool:
    try:
        get_stack(model, path)
    except ValueError:
        return False
    return True
