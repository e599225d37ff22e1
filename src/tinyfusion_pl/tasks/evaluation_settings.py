"""Checks of the settings of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

ROLES = ("teacher", "pruned", "recovered")
RESERVED = (
    *ROLES,
    "labels",
    "name",
    "reference",
    "seconds",
    "block_runs",
    "training_images",
    "shared",
    "speedup",
    "peak_memory_mib",
    "protocol",
)
"""Keys of ``metrics.json`` and ``samples.safetensors``: `Evaluate.models` cannot use them."""
LEAST = {
    "num_samples": 2,
    "batch_size": 1,
    "num_shown": 0,
    "num_timing_rounds": 0,
    "num_draws": 0,
}


def check_counts(counts: Mapping[str, int]) -> None:
    """Raise a ValueError for a count out of range."""
    for name, least in LEAST.items():
        if counts[name] < least:
            raise ValueError(f"evaluate.{name} is {counts[name]}; give a count >= {least}.")
    num_shown, num_samples = counts["num_shown"], counts["num_samples"]
    if num_shown > num_samples:
        raise ValueError(
            f"evaluate.num_shown={num_shown} is more than num_samples={num_samples}. Give "
            f"evaluate.num_shown={num_samples} or less."
        )


def check_names(models: Sequence[str], *, sampled: Sequence[str]) -> None:
    """Raise a ValueError for an unknown role in `sampled`, or an invalid or reserved model name."""
    if (wrong := [role for role in sampled if role not in ROLES]) or not sampled:
        raise ValueError(
            f"evaluate.sampled is {wrong or []}; give one or more of {', '.join(ROLES)}."
        )
    for name in models:
        if not name.isidentifier():
            raise ValueError(
                f"evaluate.models.{name}: {name!r} is not a valid name. Use letters, digits and "
                "underscores: it becomes part of file names."
            )
        if name in RESERVED:
            raise ValueError(
                f"evaluate.models.{name}: the name {name!r} is reserved in metrics.json. Give "
                f"another one; reserved names: {', '.join(RESERVED)}."
            )
