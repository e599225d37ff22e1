"""Reads the decisions of each stack from ``learn_mask/decisions.jsonl`` and from a record."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinyfusion_pl.artifacts import ArtifactError
from tinyfusion_pl.report.outside import printable

MAX_BLOCKS = 10_000  # per stack


@dataclass(frozen=True)
class StackHistory:
    """Decisions of the gates of one stack at T recorded steps, for B blocks.

    Attributes:
        steps: Steps (T,) int, ascending.
        kept: Whether a block is kept, (T, B) bool.
        probabilities: Probability that a block is kept, (T, B).
        confidence: Probability of the most likely candidate of the block's group, (T, B).
        groups: The groups at the last step: members (blocks), num_kept, num_blocks, confidence,
            entropy.
    """

    steps: np.ndarray
    kept: np.ndarray
    probabilities: np.ndarray
    confidence: np.ndarray
    groups: tuple[dict[str, Any], ...]

    @property
    def num_blocks(self) -> int:
        """Number of blocks of the stack."""
        return self.kept.shape[1]

    @property
    def settled_at(self) -> int:
        """The recorded step after which the decision does not change."""
        changed = np.flatnonzero((self.kept[1:] != self.kept[:-1]).any(axis=1))
        return int(self.steps[changed[-1] + 1] if len(changed) else self.steps[0])


def read_text(path: Path) -> str:
    """Content of a text file; a torn line may end inside a character."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ArtifactError(f"Cannot read {path}: {error}.") from error


def read_decisions(path: Path) -> tuple[dict[str, StackHistory], int]:
    """`decisions.jsonl` by stack path, and the number of torn lines that were skipped.

    A killed process leaves a torn last line; a resumed run may append to it.
    """
    by_step: dict[int, dict] = {}
    num_torn = 0
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            num_torn += 1
            continue
        try:
            by_step[int(entry["step"])] = {
                printable(stack): each for stack, each in dict(entry["stacks"]).items()
            }
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            expected = "an object with 'step' and 'stacks'"
            raise ArtifactError(
                f"{path}, line {number}: expected {expected}, got {line[:80]!r}."
            ) from error
    steps = sorted(by_step)
    stacks = {}
    for stack in by_step[steps[-1]] if steps else ():
        try:
            stacks[stack] = _history(steps, [by_step[step][stack] for step in steps])
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            raise ArtifactError(
                f"{path}: the entries of stack {stack!r} do not fit together "
                f"({type(error).__name__}: {error}). Each needs kept_blocks, groups, and "
                "block_probabilities of equal length. Did two runs write to this file?"
            ) from error
    return stacks, num_torn


def _history(steps: list[int], entries: list[dict]) -> StackHistory:
    probabilities = np.array([e["block_probabilities"] for e in entries], dtype=float)  # (T, B)
    kept = np.zeros(probabilities.shape, dtype=bool)
    confidence = np.ones(probabilities.shape)  # a block outside all groups is always kept
    for row, entry in enumerate(entries):
        kept[row, entry["kept_blocks"]] = True
        for group in entry["groups"]:
            confidence[row, members(group, entry.get("units"))] = group["confidence"]
    last = entries[-1]
    groups = tuple(
        {**group, **_as_numbers(group), "members": members(group, last.get("units"))}
        for group in last["groups"]
    )
    return StackHistory(np.array(steps), kept, probabilities, confidence, groups)


def _as_numbers(group: dict[str, Any]) -> dict[str, Any]:
    """The entries of a group that the page shows, converted to numbers."""
    entropy = group.get("entropy")
    return {
        "num_kept": int(group["num_kept"]),
        "num_blocks": int(group["num_blocks"]),
        "confidence": float(group["confidence"]),
        "entropy": None if entropy is None else float(entropy),
    }


def members(group: dict[str, Any], units: list[list[int]] | None) -> list[int]:
    """The blocks of a group, ascending.

    Args:
        group: Its `start` and `num_blocks`, which count units.
        units: The blocks of each unit; None if each block is a unit.
    """
    places = range(group["start"], group["start"] + group["num_blocks"])
    if places.start < 0 or places.stop > MAX_BLOCKS or not places:
        raise ValueError(f"a group has blocks {places.start} to {places.stop - 1}")
    return sorted(block for place in places for block in units[place]) if units else list(places)


def wrong_in(stack: dict[str, Any]) -> str:
    """The first invalid field of a stack in a record; empty if all are valid."""

    def are_below(limit: int, found: Any) -> bool:
        return isinstance(found, list) and all(
            type(each) is int and 0 <= each < limit for each in found
        )

    if not are_below(MAX_BLOCKS, [num_blocks := stack["num_blocks"]]):
        return "num_blocks"
    if not are_below(num_blocks, stack["kept_blocks"]):
        return "kept_blocks"
    units, groups = stack.get("units") or range(num_blocks), stack.get("groups") or []
    if not isinstance(units, (list, range)) or not all(
        are_below(num_blocks, unit) for unit in stack.get("units") or []
    ):
        return "units"
    if not isinstance(groups, list):
        return "groups"
    for group in groups:
        if not isinstance(group, dict):
            return "groups"
        start: Any = group.get("start")
        size: Any = group.get("num_blocks")
        if not are_below(MAX_BLOCKS, [start, size]):
            return "groups"
        if not 0 < size <= len(units) - start:
            return "groups"
    return ""
