"""Finding the stacks of a model that states none: lists of equal blocks at one width and resolution, among the modules that train.

What only looks like a stack is left out and said (frozen modules, refiners, embedders, parts inside
another part); where several readings remain, they are refused with the paths to choose from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from tinyfusion_pl.pruning.block_lists import (
    BlockList,
    block_lists,
    get_hidden_size,
    inside,
    num_params,
)
from tinyfusion_pl.pruning.blocks import (
    Stack,
    common_root,
    get_module,
    get_stack,
    split_path,
    unwrap,
    walk_modules,
)

SIDE_PARTS = re.compile(
    r"refiner|embed|control|vace|adapter|connector|resampler|perceiver|approximator|guidance|proj|text"
    r"|caption|teacher|(^|_)(ema|vae)(_|$)"
)
"""Names of lists beside the main stacks, which a model runs once on its inputs or conditions."""
SIDE_OWNERS = re.compile(
    r"refiner|embed|control|adapter|connector|resampler|perceiver|teacher|tokenizer|discriminator|critic"
    r"|(text|prompt|image|vision|caption|audio)_?encoder|(^|_)(ema|vae)(_|$)"
)
"""Names of modules beside the one to prune."""
MAX_LISTED = 30


@dataclass
class Discovery:
    """The stacks found in a model by path, and what looked like one but was left out, with the reason."""

    stacks: dict[str, Stack]
    left_out: dict[str, str] = field(default_factory=dict)

    def describe(self) -> str:
        """One sentence on what was found and left out."""
        found = (
            f"Stacks found: {', '.join(f'{p} ({len(s)} blocks)' for p, s in self.stacks.items())}."
        )
        out = "; ".join(f"{path} ({reason})" for path, reason in self.left_out.items())
        return f"{found} Left out: {out}. Name a list to prune it: stacks=PATH." if out else found


def discover(model: nn.Module) -> Discovery:
    """Find the stacks of `model`.

    A module that states them (attribute ``STACKS``, its paths) is believed, `model` itself or the
    outermost in it. Where none does: lists of at least two equal blocks, of the outermost module
    that owns such lists; several of them when they have one width (FLUX's two stacks).

    Raises:
        ValueError: when it cannot be told which lists are meant; names them.
    """
    stated = _stated_stacks(model)
    if stated:
        return Discovery({path: get_stack(model, path) for path in stated})
    candidates, left_out = block_lists(model), {}
    trained = [c for c in candidates if _trains(c.blocks)]
    if trained:
        left_out |= {c.path: "frozen" for c in candidates if c not in trained}
        candidates = trained
    if sides := [c for c in candidates if _is_side_part(c.path)]:
        if main := [c for c in candidates if c not in sides]:
            left_out |= {c.path: "by its name a part beside the main stacks" for c in sides}
            candidates = main
    if not candidates:
        return Discovery({}, left_out)
    # Of owners inside one another the outermost has the main stacks: embedders and refiners lie
    # deeper.
    owners = list(dict.fromkeys(c.owner for c in candidates))
    outermost = [o for o in owners if not any(inside(o, other) for other in owners if other != o)]
    for c in candidates:
        if c.owner not in outermost:
            left_out[c.path] = f"inside '{c.owner}', a part of the module with the main stacks"
    candidates = [c for c in candidates if c.owner in outermost]
    flat = [c for c in candidates if c.stages is None]
    if len(outermost) == 1 and flat and num_params(flat) > num_params(candidates) / 2:
        left_out |= {
            c.path: f"inside '{c.stages}', whose parts are not equal"
            for c in candidates
            if c.stages is not None
        }
        candidates = flat
    elif any(c.stages is not None for c in candidates):
        raise _ambiguous(
            model, candidates, "its blocks lie in stages of different width or resolution"
        )
    if len(outermost) > 1:
        raise _ambiguous(
            model, candidates, f"{len(outermost)} separate parts of it hold lists of blocks"
        )
    widths = {c.path: get_hidden_size(c.blocks) for c in candidates}
    main = max(candidates, key=lambda c: num_params([c]))
    for c in [c for c in candidates if widths[c.path] != widths[main.path]]:
        if type(unwrap(c.blocks[0])) is type(unwrap(main.blocks[0])):
            raise _ambiguous(model, candidates, "its lists of blocks have different widths")
        left_out[c.path] = f"of width {widths[c.path]}, not {widths[main.path]} as '{main.path}'"
        candidates.remove(c)
    return Discovery({c.path: c.blocks for c in candidates}, left_out)


def find_stacks(model: nn.Module) -> dict[str, Stack]:
    """The stacks of blocks of `model`, by path; see `discover`, which also says what was left out.

    Raises:
        ValueError: when it cannot be told which lists are meant; names them.
    """
    return discover(model).stacks


def resolve_stacks(
    model: nn.Module, stacks: str | Sequence[str] | None, *, pattern: object = None
) -> list[str]:
    """Paths of the stacks to prune: those given, checked; those that a mapping `pattern` names; or those found.

    A mapping's paths may start at `model` or at one module inside it that holds all of them.

    Raises:
        ValueError: when a path holds no list of blocks, or none is given and none found.
    """
    if stacks is None and isinstance(pattern, Mapping) and pattern:
        stacks = _named_by(model, list(pattern))
    if stacks is None:
        if not (paths := list(find_stacks(model))):
            lists = [
                f"{p!r} ({len(m)} modules)"
                for p, m in walk_modules(model)
                if isinstance(m, nn.ModuleList) and len(m) > 1
            ]
            raise ValueError(
                f"No list of equal blocks was found in {type(model).__name__}. Name its path, e.g. stacks='model.blocks'. "
                f"Lists found: {', '.join(lists[:MAX_LISTED]) or 'none'}."
            )
        return paths
    paths = [stacks] if isinstance(stacks, str) else list(stacks)
    if not paths:
        raise ValueError(
            "stacks is empty; give the path of a list of blocks, e.g. 'model.blocks', or leave it out to have it found."
        )
    for path in paths:
        get_stack(model, path)
    return [".".join(filter(None, split_path(path))) for path in paths]


def _named_by(model: nn.Module, paths: list[str]) -> list[str]:
    """The paths that a pattern names, from `model` on."""
    if _all_there(model, paths):
        return paths
    holders = [path for path, module in walk_modules(model) if path and _all_there(module, paths)]
    if trained := [
        path
        for path in holders
        if any(p.requires_grad for p in get_module(model, path).parameters())
    ]:
        holders = trained
    if len(holders) > 1:
        raise ValueError(
            f"The pattern names {paths}, which several parts of {type(model).__name__} have: "
            f"{', '.join(map(repr, holders))}. Give whole paths, e.g. '{holders[0]}.{paths[0]}'."
        )
    if not holders:
        for path in paths:  # says which one is missing, and which lists there are
            get_stack(model, path)
    return [f"{holders[0]}.{path}" for path in paths]


def _all_there(module: nn.Module, paths: list[str]) -> bool:
    try:
        return all(len(get_stack(module, path)) for path in paths)
    except ValueError:
        return False


def _stated_stacks(model: nn.Module) -> list[str]:
    stating: dict[str, nn.Module] = {}
    for path, module in walk_modules(model):
        if getattr(module, "STACKS", None) and not any(inside(path, outer) for outer in stating):
            stating[path] = module
    return [
        f"{path}.{name}" if path else name
        for path, module in stating.items()
        for name in module.STACKS
    ]


def _trains(blocks: nn.ModuleList | nn.Sequential) -> bool:
    """Whether a parameter of the blocks trains, or they carry gates (`GatedForward`), whose model may be frozen for the while."""
    return any(p.requires_grad for p in blocks.parameters()) or any(
        hasattr(getattr(unwrap(block).__dict__.get("forward"), "__self__", None), "gates")
        for block in blocks
    )


def _is_side_part(path: str) -> bool:
    owner, name = split_path(path)
    return bool(
        SIDE_PARTS.search(name) or any(SIDE_OWNERS.search(part) for part in owner.split("."))
    )


def _ambiguous(model: nn.Module, candidates: list[BlockList], why: str) -> ValueError:
    shown = ", ".join(map(str, candidates[:MAX_LISTED]))
    more = f" and {len(candidates) - MAX_LISTED} more" if len(candidates) > MAX_LISTED else ""
    root = common_root([c.path for c in candidates])
    return ValueError(
        f"Which blocks of {type(model).__name__} to prune is ambiguous: {why}. "
        f"Name the lists, e.g. stacks={candidates[0].path!r} or a list "
        f"of several. Lists of equal blocks found{f' in {root}' if root else ''}: {shown}{more}."
    )
