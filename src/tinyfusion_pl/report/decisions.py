"""What was decided about each stack: ``learn_mask/decisions.jsonl`` as arrays, and the stacks of a record."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinyfusion_pl.artifacts import ArtifactError
from tinyfusion_pl.report.outside import printable

MAX_BLOCKS = 10_000  # of a stack


@dataclass(frozen=True)
class StackHistory:
    """What the gates of one stack decided, at T recorded steps for B blocks."""

    steps: np.ndarray  # (T,) int, ascending
    kept: np.ndarray  # (T, B) bool
    probabilities: np.ndarray  # (T, B), probability that the block stays
    confidence: (
        np.ndarray
    )  # (T, B), probability of the most probable candidate of the block's group
    groups: tuple[
        dict[str, Any], ...
    ]  # at the last step: members (blocks), num_kept, num_blocks, confidence, entropy

    @property
    def num_blocks(self) -> int:
        return self.kept.shape[1]

    @property
    def settled_at(self) -> int:
        """The recorded step since which the decision has not changed."""
        changed = np.flatnonzero((self.kept[1:] != self.kept[:-1]).any(axis=1))
        return int(self.steps[changed[-1] + 1] if len(changed) else self.steps[0])


def read_text(path: Path) -> str:
    try:
        return path.read_text(
            encoding="utf-8", errors="replace"
        )  # a torn line may end within a character
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error}.") from error


def read_decisions(path: Path) -> tuple[dict[str, StackHistory], int]:
    """`decisions.jsonl` by stack path, and how many torn lines were skipped.

    A killed process tears its last line; where the resumed run appended to that, the torn line stands in the middle.
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
                f"{path}: the entries of stack {stack!r} do not fit together ({type(error).__name__}: {error}). "
                "Each needs kept_blocks, block_probabilities of one length, and groups. Did two runs write here?"
            ) from error
    return stacks, num_torn


def _history(steps: list[int], entries: list[dict]) -> StackHistory:
    probabilities = np.array(
        [entry["block_probabilities"] for entry in entries], dtype=float
    )  # (T, B)
    kept = np.zeros(probabilities.shape, dtype=bool)
    confidence = np.ones(probabilities.shape)  # a block outside all groups is not up for decision
    for row, entry in enumerate(entries):
        kept[row, entry["kept_blocks"]] = True
        for group in entry["groups"]:
            confidence[row, members(group, entry.get("units"))] = group["confidence"]
    last = entries[-1]
    groups = tuple(
        {**group, **_get_figures(group), "members": members(group, last.get("units"))}
        for group in last["groups"]
    )
    return StackHistory(np.array(steps), kept, probabilities, confidence, groups)


def _get_figures(group: dict[str, Any]) -> dict[str, Any]:
    """What the page writes of a group, as numbers, whatever the file gave."""
    entropy = group.get("entropy")
    return {
        "num_kept": int(group["num_kept"]),
        "num_blocks": int(group["num_blocks"]),
        "confidence": float(group["confidence"]),
        "entropy": None if entropy is None else float(entropy),
    }


def members(group: dict[str, Any], units: list[list[int]] | None) -> list[int]:
    """The blocks of a group, ascending; with `units`, its `start` and `num_blocks` count units of several blocks."""
    places = range(group["start"], group["start"] + group["num_blocks"])
    if places.start < 0 or places.stop > MAX_BLOCKS or not places:
        raise ValueError(f"a group has the blocks {places.start} to {places.stop - 1}")
    return sorted(block for place in places for block in units[place]) if units else list(places)


def wrong_in(stack: dict[str, Any]) -> str:
    """The first field of a stack that the page could not draw; empty where there is none."""

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
    counts = [
        [group.get("start"), group.get("num_blocks")] if isinstance(group, dict) else None
        for group in groups
    ]
    return (
        ""
        if all(are_below(MAX_BLOCKS, two) and 0 < two[1] <= len(units) - two[0] for two in counts)
        else "groups"
    )
