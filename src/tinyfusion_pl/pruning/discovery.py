"""Finding the stacks of a model that states none: lists of equal blocks at one width and resolution, among the modules that train.

What only looks like a stack is left out and said (frozen modules, refiners, embedders, parts inside another part); where several readings
remain, they are refused with the paths to choose from.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

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
RESAMPLING = re.compile(r"(down|up)_?sampl|patch_?merg", re.IGNORECASE)
MIN_SIMILARITY = (
    0.5  # of the parameters of two equal blocks; SD3.5's blocks with and without attn2: 0.6
)
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


@dataclass
class _Candidate:
    path: str
    blocks: nn.ModuleList | nn.Sequential
    stages: str | None  # path of the list of unequal parts that it lies in

    @property
    def owner(self) -> str:
        return split_path(self.path if self.stages is None else self.stages)[0]

    def __str__(self) -> str:
        return f"'{self.path}' ({len(self.blocks)} {type(unwrap(self.blocks[0])).__name__})"


def discover(model: nn.Module) -> Discovery:
    """Find the stacks of `model`.

    A module that states them (attribute ``STACKS``, its paths) is believed, `model` itself or the outermost in it. Where none does: lists
    of at least two equal blocks, of the outermost module that owns such lists; several of them when they have one width (FLUX's two
    stacks).

    Raises:
        ValueError: when it cannot be told which lists are meant; names them.
    """
    stated = _stated_stacks(model)
    if stated:
        return Discovery({path: get_stack(model, path) for path in stated})
    candidates, left_out = _candidates(model), {}
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
    # Of owners inside one another the outermost has the main stacks: embedders and refiners lie deeper.
    owners = list(dict.fromkeys(c.owner for c in candidates))
    outermost = [o for o in owners if not any(_inside(o, other) for other in owners if other != o)]
    for c in candidates:
        if c.owner not in outermost:
            left_out[c.path] = f"inside '{c.owner}', a part of the module with the main stacks"
    candidates = [c for c in candidates if c.owner in outermost]
    flat = [c for c in candidates if c.stages is None]
    if len(outermost) == 1 and flat and _num_params(flat) > _num_params(candidates) / 2:
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
    widths = {c.path: _width(c.blocks) for c in candidates}
    main = max(candidates, key=lambda c: _num_params([c]))
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
            raise ValueError(
                f"No list of equal blocks was found in {type(model).__name__}. Name its path, e.g. stacks='model.blocks'."
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
    inside = [path for path, module in walk_modules(model) if path and _all_there(module, paths)]
    if trained := [
        path
        for path in inside
        if any(p.requires_grad for p in get_module(model, path).parameters())
    ]:
        inside = trained
    if len(inside) > 1:
        raise ValueError(
            f"The pattern names {paths}, which several parts of {type(model).__name__} have: "
            f"{', '.join(map(repr, inside))}. Give whole paths, e.g. '{inside[0]}.{paths[0]}'."
        )
    if not inside:
        for path in paths:  # says which one is missing, and which lists there are
            get_stack(model, path)
    return [f"{inside[0]}.{path}" for path in paths]


def _all_there(module: nn.Module, paths: list[str]) -> bool:
    try:
        return all(len(get_stack(module, path)) for path in paths)
    except ValueError:
        return False


def _stated_stacks(model: nn.Module) -> list[str]:
    stating: dict[str, nn.Module] = {}
    for path, module in walk_modules(model):
        if getattr(module, "STACKS", None) and not any(_inside(path, outer) for outer in stating):
            stating[path] = module
    return [
        f"{path}.{name}" if path else name
        for path, module in stating.items()
        for name in module.STACKS
    ]


def _candidates(model: nn.Module) -> list[_Candidate]:
    """The outermost lists of equal blocks; inside a list of unequal parts, those in each part."""
    found: list[_Candidate] = []
    stages: list[str] = []
    gates = [path for path, module in walk_modules(model) if hasattr(module, "gate_state")]
    for path, module in walk_modules(model):
        if any(_inside(path, outer) for outer in gates):
            continue
        around = [c for c in found if _inside(path, c.path)]
        if (
            not isinstance(module, (nn.ModuleList, nn.Sequential))
            or len(module) < 2
            or any(c.stages is None for c in around)
        ):
            continue
        outer = next((stage for stage in stages if _inside(path, stage)), None)
        if _are_equal_blocks(module):
            found = [
                c for c in found if c not in around
            ]  # inside stages the innermost lists hold the blocks
            found.append(_Candidate(path, module, outer))
        elif outer is None and isinstance(module, nn.ModuleList) or _same_class(module):
            stages.append(path)
    return found


def _are_equal_blocks(blocks: nn.ModuleList | nn.Sequential) -> bool:
    """One class, much the same parameters (a few blocks may have some more or less), no change of resolution."""
    if not _same_class(blocks) or any(_resamples(unwrap(block)) for block in blocks):
        return False
    shapes = [_shapes(block) for block in blocks]
    return all(_similarity(one, other) >= MIN_SIMILARITY for one, other in zip(shapes, shapes[1:]))


def _same_class(blocks: nn.ModuleList | nn.Sequential) -> bool:
    """Whether all are of one class that has modules of its own and parameters; an adapted linear layer is no block."""
    first = unwrap(blocks[0])
    return (
        len({type(unwrap(block)) for block in blocks}) == 1
        and any(True for _ in first.children())
        and any(True for _ in first.parameters())
        and not isinstance(first, BaseTunerLayer)
    )


def _shapes(block: nn.Module) -> dict[str, tuple[int, ...]]:
    return {
        name.replace(".base_layer.", "."): tuple(p.shape)
        for name, p in unwrap(block).named_parameters()
        if ".lora_" not in name
    }


def _similarity(one: dict, other: dict) -> float:
    """The share of all parameters of two blocks that both have in one shape."""
    return sum(other.get(name) == shape for name, shape in one.items()) / max(
        len(one.keys() | other.keys()), 1
    )


def _resamples(block: nn.Module) -> bool:
    return any(
        RESAMPLING.search(f"{path.rpartition('.')[2]} {type(module).__name__}")
        and not isinstance(module, nn.Identity)
        for path, module in walk_modules(block)
        if path
    )


def _width(blocks: nn.ModuleList | nn.Sequential) -> int | None:
    """The size that most weight matrices of the blocks take."""
    sizes = Counter(p.shape[1] for block in blocks for p in block.parameters() if p.ndim >= 2)
    return max(sizes, key=sizes.get) if sizes else None


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


def _inside(path: str, outer: str) -> bool:
    return outer == "" or path == outer or path.startswith(f"{outer}.")


def _num_params(candidates: list[_Candidate]) -> int:
    return sum(p.numel() for c in candidates for p in c.blocks.parameters())


def _ambiguous(model: nn.Module, candidates: list[_Candidate], why: str) -> ValueError:
    shown = ", ".join(map(str, candidates[:MAX_LISTED]))
    more = f" and {len(candidates) - MAX_LISTED} more" if len(candidates) > MAX_LISTED else ""
    root = common_root([c.path for c in candidates])
    return ValueError(
        f"Which blocks of {type(model).__name__} to prune is ambiguous: {why}. "
        f"Name the lists, e.g. stacks={candidates[0].path!r} or a list "
        f"of several. Lists of equal blocks found{f' in {root}' if root else ''}: {shown}{more}."
    )
