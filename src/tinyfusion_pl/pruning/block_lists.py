"""Lists of equal blocks in a model: what a stack can be, by structure alone."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from tinyfusion_pl.pruning.blocks import split_path, unwrap, walk_modules

RESAMPLING = re.compile(r"(down|up)_?sampl|patch_?merg", re.IGNORECASE)
MIN_SIMILARITY = (
    0.5  # of the parameters of two equal blocks; SD3.5's blocks with and without attn2: 0.6
)


@dataclass
class BlockList:
    path: str
    blocks: nn.ModuleList | nn.Sequential
    stages: str | None  # path of the list of unequal parts that it lies in

    @property
    def owner(self) -> str:
        return split_path(self.path if self.stages is None else self.stages)[0]

    def __str__(self) -> str:
        return f"'{self.path}' ({len(self.blocks)} {type(unwrap(self.blocks[0])).__name__})"


def block_lists(model: nn.Module) -> list[BlockList]:
    """The outermost lists of equal blocks; inside a list of unequal parts, those in each part."""
    found: list[BlockList] = []
    stages: list[str] = []
    gates = [path for path, module in walk_modules(model) if hasattr(module, "gate_state")]
    for path, module in walk_modules(model):
        if any(inside(path, outer) for outer in gates):
            continue
        around = [c for c in found if inside(path, c.path)]
        if (
            not isinstance(module, (nn.ModuleList, nn.Sequential))
            or len(module) < 2
            or any(c.stages is None for c in around)
        ):
            continue
        outer = next((stage for stage in stages if inside(path, stage)), None)
        if _are_equal_blocks(module):
            found = [
                c for c in found if c not in around
            ]  # inside stages the innermost lists hold the blocks
            found.append(BlockList(path, module, outer))
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


def get_hidden_size(blocks: nn.ModuleList | nn.Sequential) -> int | None:
    """The size that most weight matrices of the blocks take."""
    sizes = Counter(p.shape[1] for block in blocks for p in block.parameters() if p.ndim >= 2)
    return max(sizes, key=sizes.get) if sizes else None


def inside(path: str, outer: str) -> bool:
    return outer == "" or path == outer or path.startswith(f"{outer}.")


def num_params(candidates: list[BlockList]) -> int:
    return sum(p.numel() for c in candidates for p in c.blocks.parameters())
