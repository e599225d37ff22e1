"""The configuration of another library's model after the cut, so that the library itself builds the shallow model from it.

Which settings change is found by building (`config_search`); blocks that no config describes
without them always stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from tinyfusion_pl.pruning.blocks import get_module, get_stack, split_path, unwrap
from tinyfusion_pl.pruning.config_search import ConfigChange, find_change
from tinyfusion_pl.pruning.known_models import known_fixed_blocks
from tinyfusion_pl.pruning.library_interface import (
    library_root,
    plain_shapes,
    rebuilt,
    write_settings,
)


def config_mismatch(model: nn.Module) -> str | None:
    """Why the config of `model` does not describe it, in one clause; None when it does."""
    return rebuilt(model)[1]


def config_changes(
    model: nn.Module, kept_blocks: Mapping[str, Sequence[int]]
) -> list[ConfigChange]:
    """The changes of the configs of all library models in `model` whose stacks are cut."""
    roots: dict[str, dict[str, Sequence[int]]] = {}
    for path, kept in kept_blocks.items():
        if (root := library_root(model, path)) is not None:
            roots.setdefault(root, {})[path] = kept
    return [find_change(model, root, kept) for root, kept in roots.items()]


def apply_change(model: nn.Module, change: ConfigChange) -> None:
    """Write the settings; plain attributes are the caller's, who knows the modules from before the cut."""
    if change.reason is None:
        write_settings(get_module(model, change.root), change.settings)


def check_library_config(model: nn.Module, kept_blocks: Mapping[str, Sequence[int]]) -> str | None:
    """Find out, before any training and without touching `model`, whether its library can build the shallow model.

    Returns:
        None when the model states its depth, one of this project's too; else a sentence on why it
        cannot, and what is saved.

    Raises:
        ValueError: when a block is dropped that has to stay.
    """
    check_fixed_blocks(model, kept_blocks)
    stated = [path for path in kept_blocks if _states_itself(model, path)]
    changes = config_changes(
        model, {path: kept for path, kept in kept_blocks.items() if path not in stated}
    )
    reasons = [
        f"{type(get_module(model, c.root)).__name__} cannot state its depth: {c.reason}"
        for c in changes
        if c.reason
    ]
    if others := [p for p in kept_blocks if p not in stated and library_root(model, p) is None]:
        reasons.append(
            f"{type(get_module(model, split_path(others[0])[0])).__name__} has no config of diffusers or transformers that "
            "would state its depth"
        )
    if not reasons:
        return None
    return f"{'; '.join(reasons)}. The shallow model is saved as a state dict with its record, which load_shallow(path, model=...) reads."


def _states_itself(model: nn.Module, path: str) -> bool:
    owner, name = split_path(path)
    return name in (getattr(get_module(model, owner), "STACKS", None) or ())


def check_fixed_blocks(model: nn.Module, kept_blocks: Mapping[str, Sequence[int]]) -> None:
    """Raise ValueError where a block is dropped that has to stay."""
    for path, kept in kept_blocks.items():
        if missing := sorted(fixed_blocks(model, path) - set(kept)):
            raise ValueError(
                f"kept_blocks of '{path}' is {list(kept)}, but {missing} must stay: {type(_owner(model, path)).__name__} builds "
                "or runs them unlike the others. Keep them."
            )


def _owner(model: nn.Module, path: str) -> nn.Module:
    return get_module(model, split_path(path)[0])


def fixed_blocks(model: nn.Module, path: str) -> frozenset[int]:
    """Blocks of the stack at `path` that always stay.

    Those known of the class, and a first or last block with other parameters than its neighbors
    when no config describes the model without it (SD3's last block, ``context_pre_only``), though
    one does without another block.
    """
    if _states_itself(model, path) or (root := library_root(model, path)) is None:
        return frozenset()
    owner_path, name = split_path(path)
    known = known_fixed_blocks(get_module(model, owner_path), name)
    stack = get_stack(model, path)
    n, shapes = len(stack), [plain_shapes(unwrap(block)) for block in stack]
    if n < 3 or known:
        return known
    ends = [i for i, neighbor in ((0, 1), (n - 1, n - 2)) if shapes[i] != shapes[neighbor]]

    def describes(without: int) -> bool:
        return (
            find_change(model, root, {path: [i for i in range(n) if i != without]}).reason is None
        )

    ordinary = next((i for i in range(1, n - 1) if describes(i)), None) if ends else None
    return frozenset(i for i in ends if ordinary is not None and not describes(i))
