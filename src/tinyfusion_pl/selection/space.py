"""What a criterion chooses from: the units of one or several stacks, and how many of them stay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion_pl.pruning.blocks import Units, by_path, get_stack, get_units
from tinyfusion_pl.pruning.budget import both_or_neither, get_count
from tinyfusion_pl.pruning.decision import Decision, GroupDecision, StackDecision
from tinyfusion_pl.pruning.discovery import resolve_stacks
from tinyfusion_pl.pruning.library_configs import fixed_blocks
from tinyfusion_pl.pruning.patterns import Pattern


@dataclass(frozen=True)
class Part:
    """Units that share a budget, indexed through all stacks; `num_kept` of them stay."""

    members: tuple[int, ...]
    num_kept: int


class Space:
    """The allowed structures: of each `Part`, exactly `num_kept` units stay.

    Units are indexed through all stacks.

    Args:
        model: The model.
        keep: Units that stay: a count, or a share in (0, 1), of all stacks together; or a mapping
            from stack path.
        pattern: ``"N:M"`` in place of `keep`: N of every M consecutive units stay; or a mapping
            from stack path.
        stacks: Path or paths of the block lists; default: found.
        units: Blocks that only go together, see `DepthGates`.

    Raises:
        ValueError: for neither or both of `keep` and `pattern`, and for a budget that cannot be
            met.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        keep: Any = None,
        pattern: Any = None,
        stacks: str | Sequence[str] | None = None,
        units: Any = None,
    ) -> None:
        if (keep is None) == (pattern is None):
            raise ValueError(both_or_neither(keep, pattern))
        budget = keep if pattern is None else pattern
        self.paths = resolve_stacks(
            model, stacks, pattern=budget if isinstance(budget, Mapping) else "1:1"
        )
        given = by_path(units, self.paths, "units")
        self.units: dict[str, Units] = {
            path: get_units(model, path, given[path]) for path in self.paths
        }
        self.num_blocks = {path: len(get_stack(model, path)) for path in self.paths}
        self._start: dict[str, int] = {}
        self.num_units = 0
        for path in self.paths:
            self._start[path] = self.num_units
            self.num_units += len(self.units[path])
        stays = {path: fixed_blocks(model, path) for path in self.paths}
        self.fixed = frozenset(
            self._start[path] + i
            for path in self.paths
            for i, unit in enumerate(self.units[path])
            if set(unit) & set(stays[path])
        )
        patterns = by_path(pattern, self.paths, "pattern") if pattern else {}
        self.pattern = {
            path: str(Pattern.parse(each, enumerated=False)) for path, each in patterns.items()
        }
        self.parts = self._by_pattern() if pattern else self._by_count(keep)

    def _by_pattern(self) -> list[Part]:
        parts = []
        for path in self.paths:
            for group in Pattern.parse(self.pattern[path], enumerated=False).groups(
                len(self.units[path])
            ):
                parts.append(
                    self._part([self._start[path] + i for i in group.members], group.num_kept)
                )
        return self._checked(parts)

    def _by_count(self, keep: Any) -> list[Part]:
        if isinstance(keep, Mapping):
            keeps = by_path(keep, self.paths, "keep")
            counts = {
                path: get_count(keeps[path], len(self.units[path]), path) for path in self.paths
            }
            return self._checked(
                [self._part(self.members(path), count) for path, count in counts.items()]
            )
        return self._checked(
            [
                self._part(
                    range(self.num_units), get_count(keep, self.num_units, ", ".join(self.paths))
                )
            ]
        )

    def _part(self, members: Iterable[int], num_kept: int) -> Part:
        members = tuple(members)
        if (num_fixed := len(self.fixed & set(members))) > num_kept:
            raise ValueError(
                f"{num_kept} of {len(members)} units are to stay, but {num_fixed} of them cannot "
                "go. Keep more of them."
            )
        return Part(members, num_kept)

    def _checked(self, parts: list[Part]) -> list[Part]:
        if all(part.num_kept == len(part.members) for part in parts):
            raise ValueError(
                "Every unit would stay, so that there is nothing to choose. Keep fewer of them."
            )
        return parts

    # -- structures -----------------------------------------------------------
    def members(self, path: str) -> range:
        """Places of a stack's units."""
        return range(self._start[path], self._start[path] + len(self.units[path]))

    def free(self, part: Part) -> list[int]:
        """The units of a part that may go."""
        return [i for i in part.members if i not in self.fixed]

    def num_free_kept(self, part: Part) -> int:
        """How many of those stay."""
        return part.num_kept - len(self.fixed & set(part.members))

    def top(self, scores: Tensor) -> Tensor:
        """The structure that keeps the units with the highest scores: (num_units,) bool.

        Ties keep the first.
        """
        kept = torch.zeros(self.num_units, dtype=torch.bool)
        kept[list(self.fixed)] = True
        for part in self.parts:
            ranked = sorted(self.free(part), key=lambda i: (-float(scores[i]), i))
            kept[ranked[: self.num_free_kept(part)]] = True
        return self._with_every_stack(kept, scores)

    def _with_every_stack(self, kept: Tensor, scores: Tensor) -> Tensor:
        """Give each empty stack its best unit, in place of the worst that another can spare."""
        for path in self._empty(kept):
            best = max((i for i in self.members(path)), key=lambda i: (float(scores[i]), -i))
            part = next(part for part in self.parts if best in part.members)
            spare = [
                i
                for i in self.free(part)
                if kept[i] and int(kept[list(self._members_beside(i))].sum()) > 1
            ]
            if not spare:
                raise ValueError(
                    f"keep is {part.num_kept}, too few for a block in each of the stacks "
                    f"{', '.join(self.paths)}. Keep more, or name the stacks to prune (stacks=)."
                )
            kept[min(spare, key=lambda i: (float(scores[i]), -i))] = False
            kept[best] = True
        return kept

    def _members_beside(self, unit: int) -> range:
        return next(self.members(path) for path in self.paths if unit in self.members(path))

    def _empty(self, structure: Tensor) -> list[str]:
        """Stacks that would lose all their blocks."""
        return [path for path, kept in self.kept_blocks(structure).items() if not kept]

    def is_valid(self, structure: Tensor) -> bool:
        """Whether every stack keeps a block."""
        return len(self.paths) == 1 or not self._empty(structure)

    def check(self, kept: Sequence[int], *, what: str) -> Tensor:
        """The structure that keeps exactly these units.

        Raises:
            ValueError: when it is not one that is allowed.
        """
        if wrong := [i for i in kept if not 0 <= i < self.num_units]:
            raise ValueError(
                f"{what} names the units {wrong}; there are 0 to {self.num_units - 1}."
            )
        structure = torch.zeros(self.num_units, dtype=torch.bool)
        structure[list(kept)] = True
        for part in self.parts:
            if (found := int(structure[list(part.members)].sum())) != part.num_kept:
                raise ValueError(
                    f"{what} keeps {found} of the units {part.members[0]} to {part.members[-1]}, "
                    f"but {part.num_kept} are to stay."
                )
        if empty := self._empty(structure):
            raise ValueError(
                f"{what} keeps no block of {', '.join(empty)}; each stack keeps one at least. "
                "Give a budget for each (keep={PATH: COUNT, ...})."
            )
        if missing := [i for i in self.fixed if not structure[i]]:
            raise ValueError(f"{what} drops the units {sorted(missing)}, which have to stay.")
        return structure

    def by_path(self, structures: Tensor) -> dict[str, Tensor]:
        """`structures` (..., num_units) of each stack."""
        return {
            path: structures[..., self._start[path] : self._start[path] + len(self.units[path])]
            for path in self.paths
        }

    def kept_blocks(self, structure: Tensor) -> dict[str, list[int]]:
        """The blocks that a structure keeps: those of its units, and those in no unit."""
        kept = {}
        for path, keeps in self.by_path(structure).items():
            dropped = {
                i for unit, keep in zip(self.units[path], keeps.tolist()) if not keep for i in unit
            }
            kept[path] = [i for i in range(self.num_blocks[path]) if i not in dropped]
        return kept

    def decision(
        self,
        structure: Tensor,
        *,
        criterion: str,
        scores: Tensor | None = None,
        probabilities: Tensor | None = None,
        confidence: float | None = None,
        entropy: float | None = None,
    ) -> Decision:
        """The decision for a structure; `scores` and `probabilities` are (num_units,)."""
        stacks, blocks = {}, self.kept_blocks(structure)
        for path in self.paths:
            keeps, members = (
                structure[self.members(path).start : self.members(path).stop],
                self.members(path),
            )
            groups = []
            for part in self.parts:
                inside = [i - members.start for i in part.members if i in members]
                if inside:
                    kept = [i for i in inside if keeps[i]]
                    groups.append(
                        GroupDecision(
                            inside[0],
                            len(kept),
                            len(inside),
                            kept,
                            confidence=confidence,
                            entropy=entropy,
                        )
                    )
            chances = (
                keeps.double()
                if probabilities is None
                else probabilities[members.start : members.stop]
            )
            unit_of = {block: n for n, unit in enumerate(self.units[path]) for block in unit}
            stacks[path] = StackDecision(
                self.pattern.get(path, f"{int(keeps.sum())}:{len(keeps)}"),
                self.num_blocks[path],
                blocks[path],
                [
                    float(chances[unit_of[b]]) if b in unit_of else 1.0
                    for b in range(self.num_blocks[path])
                ],
                groups,
                units=[list(unit) for unit in self.units[path]],
                criterion=criterion,
                scores=None
                if scores is None
                else [float(s) for s in scores[members.start : members.stop]],
            )
        return Decision(stacks)
