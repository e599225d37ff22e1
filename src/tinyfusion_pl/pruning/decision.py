"""What mask learning decides: which blocks stay, and how sure it is."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class GroupDecision:
    """One group: its place among the units, the units kept, and the distribution over candidates.

    `confidence` is the largest candidate probability, `entropy` that of the distribution in nats,
    None where nothing was learned; `probabilities` is None where there are too many candidates to
    list.
    """

    start: int
    num_kept: int
    num_blocks: int
    kept: list[int]
    confidence: float | None = None
    entropy: float | None = None
    probabilities: list[float] | None = None


@dataclass
class StackDecision:
    """One stack: pattern, blocks kept (ascending), the probability of each block to stay, and its groups.

    `criterion` names what chose, None for learned masks; `scores` has its value of each unit,
    higher where the unit should stay.
    """

    pattern: str
    num_blocks: int
    kept_blocks: list[int]
    block_probabilities: list[float]
    groups: list[GroupDecision] = field(default_factory=list)
    units: list[list[int]] | None = None
    criterion: str | None = None
    scores: list[float] | None = None

    def layer_pairs(self) -> list[tuple[int, int]]:
        """(student block, teacher block) pairs for representation distillation.

        The last kept block of each group, at its place in the shallow stack, goes with the last
        block of that group in the teacher. Units
        of several blocks give a pair for each place in the unit: of mirrored pairs, the in blocks
        one and the out blocks one.

        Where a `criterion` chose, pairs are spaced evenly, the same for every criterion: block i of
        k with block (i + 1) n / k - 1 of n,
        rounded down.
        """
        if self.criterion is not None:
            num_kept = len(self.kept_blocks)
            return [(i, (i + 1) * self.num_blocks // num_kept - 1) for i in range(num_kept)]
        units = self.units or [[i] for i in range(self.num_blocks)]
        place = {block: i for i, block in enumerate(self.kept_blocks)}
        pairs = []
        for group in self.groups:
            for of_kept, of_all in zip(
                zip(*(units[unit] for unit in group.kept)),
                zip(*(units[unit] for unit in range(group.start, group.start + group.num_blocks))),
            ):
                pairs.append((place[max(of_kept)], max(of_all)))
        return pairs


@dataclass
class Decision:
    """The decision of a whole model, by stack path."""

    stacks: dict[str, StackDecision]

    @property
    def kept_blocks(self) -> dict[str, list[int]]:
        return {path: stack.kept_blocks for path, stack in self.stacks.items()}

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form, the `stacks` of a record."""
        return {path: asdict(stack) for path, stack in self.stacks.items()}

    @classmethod
    def from_dict(cls, stacks: dict[str, Any]) -> Decision:
        return cls(
            {
                path: StackDecision(
                    **{**stack, "groups": [GroupDecision(**group) for group in stack["groups"]]}
                )
                for path, stack in stacks.items()
            }
        )

    def telemetry(self) -> dict[str, Any]:
        """The short form for a line of decisions.jsonl: no candidate lists, which grow to thousands."""
        return {
            path: {
                "kept_blocks": stack.kept_blocks,
                "units": stack.units,
                "block_probabilities": [round(p, 6) for p in stack.block_probabilities],
                "groups": [
                    {
                        "start": g.start,
                        "num_kept": g.num_kept,
                        "num_blocks": g.num_blocks,
                        "confidence": _rounded(g.confidence),
                        "entropy": _rounded(g.entropy),
                    }
                    for g in stack.groups
                ],
            }
            for path, stack in self.stacks.items()
        }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
