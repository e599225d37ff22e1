"""Number of classes in a label table: all rows, or all but the last, which is the null label's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tinyfusion_pl.artifacts import ArtifactError
from tinyfusion_pl.models.notices import warn


def label_arguments(
    state: Mapping[str, Tensor],
    given: Mapping[str, Any],
    where: str | Path,
    *,
    tables: Sequence[str],
    named: bool = False,
) -> dict[str, Any]:
    """``num_classes``, and ``class_dropout_prob`` 0 where the table has no null row.

    A table of n rows has n classes, trained without label dropout, or n - 1 classes and the null
    label. The statement in `given` decides: ``class_dropout_prob``, or ``num_classes`` of the
    caller or of the registered model. Without one, the null label, which guidance requires, is
    assumed, with a warning that names both readings.

    Args:
        state: State dict in the published layout.
        given: Arguments that the caller or the registered name states.
        where: Origin of `state`, for messages.
        tables: Keys of label tables; the first that exists is read.
        named: The caller named the model: a mismatch is left for the weights' check to report.

    Returns:
        The arguments; empty without a table.
    """
    table = next((key for key in tables if key in state), None)
    if table is None:
        return {}
    if state[table].ndim != 2 or not len(state[table]):
        raise ArtifactError(
            f"{where} holds {table} with shape {tuple(state[table].shape)}; expected (number of "
            "labels, width). The file is damaged or belongs to another model."
        )
    rows, num_classes = len(state[table]), given.get("num_classes")
    without_null: dict[str, Any] = {"num_classes": rows, "class_dropout_prob": 0.0}
    with_null: dict[str, Any] = {"num_classes": rows - 1}
    if "class_dropout_prob" in given:
        if named:
            return {}
        return {"num_classes": rows if given["class_dropout_prob"] == 0 else rows - 1}
    if rows == num_classes:
        return without_null
    if rows - 1 == num_classes:
        return with_null
    if named:
        return {}
    if rows == 1:
        return without_null
    warn(
        f"{where} has {rows} labels: either {rows - 1} classes and the null label of "
        f"classifier-free guidance, or {rows} classes trained without it (class_dropout_prob=0). "
        f"Assuming {rows - 1} classes and the null label: give num_classes={rows} for the other, "
        f"num_classes={rows - 1} to confirm."
    )
    return with_null
