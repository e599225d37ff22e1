"""What is known of other libraries' models by their class: blocks that only go together, and blocks that always stay.

Only what a model's own modules and configuration do not tell: `library_configs.fixed_blocks` finds
the rest by building the model.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def _mirrored(owner: nn.Module, name: str) -> tuple[tuple[int, int], ...]:
    """Block i puts out what block n - 1 - i takes."""
    n = len(getattr(owner, name))
    return tuple((i, n - 1 - i) for i in range(n // 2))


def _middle_pair(owner: nn.Module, name: str) -> frozenset[int]:
    """The two blocks in the middle of mirrored pairs, which have no skip between them."""
    n = len(getattr(owner, name))
    return frozenset({n // 2 - 1, n // 2})


def _vace_layers(owner: nn.Module, name: str) -> frozenset[int]:
    """Blocks whose output a VACE block adds to: what it adds would be added elsewhere."""
    return frozenset(owner.config["vace_layers"])


UNITS: dict[tuple[str, str], Callable[[nn.Module, str], tuple[tuple[int, ...], ...]]] = {
    ("HunyuanDiT2DModel", "blocks"): _mirrored,
}
FIXED: dict[tuple[str, str], Callable[[nn.Module, str], frozenset[int]]] = {
    ("HunyuanDiT2DModel", "blocks"): _middle_pair,
    ("WanVACETransformer3DModel", "blocks"): _vace_layers,
}


def known_units(owner: nn.Module, name: str) -> tuple[tuple[int, ...], ...] | None:
    """Blocks of list `name` of `owner` that only go together, None where nothing is known."""
    for cls in type(owner).__mro__:
        if (units := UNITS.get((cls.__name__, name))) is not None:
            return units(owner, name)
    return None


def known_fixed_blocks(owner: nn.Module, name: str) -> frozenset[int]:
    """Blocks of list `name` of `owner` that always stay."""
    for cls in type(owner).__mro__:
        if (fixed := FIXED.get((cls.__name__, name))) is not None:
            return fixed(owner, name)
    return frozenset()
