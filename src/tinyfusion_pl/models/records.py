"""``record.json``: what it must hold, checked field by field before anything is built from it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tinyfusion_pl.artifacts import ArtifactError, read_json
from tinyfusion_pl.checksums import SEAL, content_sha256
from tinyfusion_pl.models.notices import first_line, warn
from tinyfusion_pl.models.registry import registered_name
from tinyfusion_pl.pruning import Decision, get_stack
from tinyfusion_pl.pruning.run_maps import POSITIONS, RunMap

RECORD = "record.json"
TRAINING_IMAGES = "num_training_images"  # repeated ones counted each time
MAX_BLOCKS = 10_000  # of a dense stack
TOLERANCE = 1e-4  # of probabilities, which are sums of rounded numbers
MISSING = object()
COUNT, NUMBER, TEXT, NAMES, ROWS = (
    "an integer >= 0",
    "a finite number",
    "text",
    "a mapping",
    "a list",
)
IMAGES = "a number of images >= 1"
STACK = {
    "pattern": TEXT,
    "num_blocks": COUNT,
    "kept_blocks": "a list of block numbers",
    "block_probabilities": "a list of numbers",
    "groups": ROWS,
}
GROUP = {"start": COUNT, "num_kept": COUNT, "num_blocks": COUNT, "kept": "a list of block numbers"}
LEARNED = {
    "confidence": NUMBER,
    "entropy": NUMBER,
    "probabilities": "a list of numbers",
}  # of a group, null where nothing was learned


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_BLOCKS


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


CHECKS = {
    COUNT: _is_count,
    IMAGES: lambda value: type(value) is int and value > 0,
    NUMBER: _is_number,
    TEXT: lambda value: isinstance(value, str),
    NAMES: lambda value: isinstance(value, dict),
    ROWS: lambda value: isinstance(value, list),
    "a list of block numbers": lambda value: isinstance(value, list) and all(map(_is_count, value)),
    "a list of numbers": lambda value: isinstance(value, list) and all(map(_is_number, value)),
    "64 hexadecimal digits": lambda value: (
        isinstance(value, str) and len(value) == 64 and not set(value) - set("0123456789abcdef")
    ),
}


def field(
    content: Any, path: str, expected: str, where: str | Path, *, optional: bool = False
) -> Any:
    """The value at the dotted `path` of a file's `content`.

    Raises:
        ArtifactError: it is missing, or not what is `expected` (a key of `CHECKS`); names file and
            field.
    """
    value = content
    for name in path.split("."):
        value = value.get(name, MISSING) if isinstance(value, Mapping) else MISSING
    if optional and (value is None or value is MISSING):
        return None
    check(value, path, expected, where)
    return value


def check(value: Any, path: str, expected: str, where: str | Path) -> None:
    """`ArtifactError` where `value`, which is at `path` of the file `where`, is not what is `expected`."""
    if value is MISSING:
        raise ArtifactError(
            f"{where} lacks {path!r} ({expected}). It may be damaged, or of another version: copy the folder again."
        )
    if not CHECKS[expected](value):
        raise ArtifactError(
            f"{where}: {path!r} is {value!r:.80}; {expected} was expected. Copy the folder again."
        )


def read_record(folder: str | Path, *, decided: bool = False) -> dict[str, Any]:
    """The record in `folder`, each field of the type that it must have.

    Args:
        decided: It must hold a decision, as that of a shallow model does.

    Raises:
        ArtifactError: names the file and the field.
    """
    file = Path(folder) / RECORD
    record = read_json(file)
    if not isinstance(record, dict):
        raise ArtifactError(
            f"{file} holds {type(record).__name__}, where a mapping was expected. Copy the folder again."
        )
    if SEAL in record and record[SEAL] != content_sha256(
        {name: value for name, value in record.items() if name != SEAL}
    ):
        warn(
            f"{file} does not match its own checksum: it was edited since it was written, or is damaged."
        )
    field(record, "weights.sha256", "64 hexadecimal digits", file)
    for name in ("model", "library", "model_factory"):
        if field(record, name, NAMES, file, optional=True) is not None:
            if name != "library":  # of which the library is asked
                _check_name(name, field(record, f"{name}.name", TEXT, file), file)
                field(record, f"{name}.kwargs", NAMES, file, optional=name != "model")
    field(record, TRAINING_IMAGES, IMAGES, file, optional=True)
    if field(record, "width", NAMES, file, optional=True) is not None:
        for name in ("hidden_size", "dense_hidden_size"):
            field(record, f"width.{name}", COUNT, file)
        built, stated = (
            (record.get("model") or {}).get("kwargs", {}).get("hidden_size"),
            record["width"]["hidden_size"],
        )
        if built != stated:
            raise ArtifactError(
                f"{file}: 'width.hidden_size' is {stated}, and 'model.kwargs.hidden_size' is {built!r:.80}. It was "
                "edited, or is damaged: copy the folder again."
            )
    if decided or "stacks" in record:
        _check_stacks(field(record, "stacks", NAMES, file), file)
    return record


def _check_name(entry: str, name: str, file: Path) -> None:
    """`ArtifactError` for a model that is not one of this project's."""
    if entry == "model":
        try:
            registered_name(name)
        except ValueError as error:
            raise ArtifactError(
                f"{file}: 'model.name' is {name!r:.80}. {first_line(error)}"
            ) from error


def get_decision(record: Mapping[str, Any], where: str | Path) -> Decision:
    """The decision in a record that `read_record` read."""
    try:
        return Decision.from_dict(record["stacks"])
    except TypeError as error:  # a field of another version
        raise ArtifactError(
            f"{where}: 'stacks' does not hold a decision ({error}). Install the version that wrote it."
        ) from error


def maps_in(record: Mapping[str, Any], state: Mapping[str, Tensor], where: Path) -> list[RunMap]:
    """The linear maps in place of removed runs that a record states, held against the weights beside it.

    Raises:
        ArtifactError: names the field.
    """
    found = []
    for number, entry in enumerate(field(record, "run_maps", ROWS, where, optional=True) or []):
        at = f"run_maps[{number}]"
        _check_fields(entry, {"module": TEXT, "position": TEXT, "width": COUNT}, at, where)
        if entry["position"] not in POSITIONS:
            raise ArtifactError(
                f"{where}: '{at}.position' is {entry['position']!r:.80}; {' or '.join(map(repr, POSITIONS))} was expected. "
                "Copy the folder again."
            )
        key, width = f"{entry['module']}.{POSITIONS[entry['position']]}.weight", entry["width"]
        if key not in state or tuple(state[key].shape) != (width, width):
            raise ArtifactError(
                f"{where}: '{at}' states a linear map of width {width}, which the weights do not have under {key:.120}. "
                "Copy the folder again."
            )
        found.append(RunMap(entry["module"], entry["position"], width))
    return found


def _check_stacks(stacks: Mapping[str, Any], file: Path) -> None:
    for path, stack in stacks.items():
        at = f"stacks.{path}"
        _check_fields(stack, STACK, at, file)
        for number, group in enumerate(stack["groups"]):
            _check_fields(group, GROUP, f"{at}.groups[{number}]", file)
            _check_given(group, LEARNED, f"{at}.groups[{number}]", file)
        _check_given(stack, {"criterion": TEXT, "scores": "a list of numbers"}, at, file)
        if (units := stack.get("units")) is not None:
            check(units, f"{at}.units", ROWS, file)
            for number, unit in enumerate(units):
                check(unit, f"{at}.units[{number}]", "a list of block numbers", file)
        for place, wrong in _contradictions(stack):
            raise ArtifactError(
                f"{file}: '{at}.{place}' {wrong}. It was edited, or is damaged: copy the folder again."
            )


def _contradictions(stack: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Fields of a stack's decision that do not go with its others, and why."""
    num_blocks, kept, groups = stack["num_blocks"], stack["kept_blocks"], stack["groups"]
    if sorted(set(kept)) != kept or not kept or kept[-1] >= num_blocks:
        yield (
            "kept_blocks",
            f"is {kept!r:.80}; ascending numbers below {num_blocks}, each once, were expected",
        )
    if len(stack["block_probabilities"]) not in (0, num_blocks) or not all(
        map(_is_share, stack["block_probabilities"])
    ):
        yield (
            "block_probabilities",
            (
                f"is {stack['block_probabilities']!r:.80}; one between 0 and 1 for each of {num_blocks} blocks, or "
                "none at all, was expected"
            ),
        )
    units = stack.get("units") or [[block] for block in range(num_blocks)]
    in_units = [block for unit in units for block in unit]
    if len(set(in_units)) != len(in_units) or not all(block < num_blocks for block in in_units):
        yield "units", f"names a block twice, or one that is not below {num_blocks}"
    for number, group in enumerate(groups):
        members = range(group["start"], group["start"] + group["num_blocks"])
        ascending = (
            sorted(set(group["kept"])) == group["kept"] and len(group["kept"]) == group["num_kept"]
        )
        if not ascending or not set(group["kept"]) <= set(members) or members.stop > len(units):
            yield (
                f"groups[{number}]",
                (
                    f"keeps {group['kept']!r:.80}; {group['num_kept']} of {members.start} to {members.stop - 1} were "
                    f"expected, and there are {len(units)} units"
                ),
            )
        elif any(
            (block in kept) != (unit in group["kept"]) for unit in members for block in units[unit]
        ):
            yield (
                f"groups[{number}]",
                f"keeps {group['kept']!r:.80}, and 'kept_blocks' is {kept!r:.80}",
            )
        chances = [group.get("confidence"), *(group.get("probabilities") or [])]
        if (
            not all(p is None or _is_share(p) for p in chances)
            or (group.get("entropy") or 0.0) < -TOLERANCE
        ):
            yield (
                f"groups[{number}]",
                "has a probability that is not between 0 and 1, or a negative entropy",
            )


def _is_share(number: float) -> bool:
    return -TOLERANCE <= number <= 1 + TOLERANCE


def check_depths(model: nn.Module, decision: Decision, where: str | Path) -> None:
    """Find out whether a model that was built has as many blocks as a record says that it kept.

    Raises:
        ArtifactError: it has others; names the stack.
    """
    for path, kept in decision.kept_blocks.items():
        try:
            num = len(get_stack(model, path))
        except (ValueError, AttributeError) as error:
            raise ArtifactError(
                f"{where} decides on the stack {path!r:.80}, which its model has not ({error}). Copy the folder "
                "again."
            ) from error
        if num != len(kept):
            raise ArtifactError(
                f"{where} says that {len(kept)} blocks of {path!r:.80} were kept, and its model has {num}. Copy "
                "the folder again."
            )


def _check_fields(content: Any, fields: Mapping[str, str], at: str, file: Path) -> None:
    check(content, at, NAMES, file)
    for name, expected in fields.items():
        check(content.get(name, MISSING), f"{at}.{name}", expected, file)


def _check_given(
    content: Mapping[str, Any], fields: Mapping[str, str], at: str, file: Path
) -> None:
    """As `_check_fields`, of those that are there and not null."""
    for name, expected in fields.items():
        if content.get(name) is not None:
            check(content[name], f"{at}.{name}", expected, file)
