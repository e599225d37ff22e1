"""How many classes a label table has: all of its rows, or all but the last, which is then the null label's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tinyfusion_pl.artifacts import ArtifactError
from tinyfusion_pl.models.notices import warn

# DiT and SiT, U-DiT, U-ViT. MAR keeps its null label apart.
TABLES = (
    "y_embedder.embedding_table.weight",
    "y_embedder_1.embedding_table.weight",
    "label_emb.weight",
)


def label_arguments(
    state: Mapping[str, Tensor], given: Mapping[str, Any], where: str | Path, *, named: bool = False
) -> dict[str, Any]:
    """``num_classes`` and, without a null row, ``class_dropout_prob`` 0, as the label table of `state` shows them; empty without a table.

    A table of n rows is one of n classes, trained without label dropout, or of n - 1 and the null label. What is stated decides: `given`
    has ``class_dropout_prob``, or the ``num_classes`` of the caller or of the registered model. Where none of it does, the null
    label, which guidance needs, is assumed, and both readings are said.

    Args:
        named: The caller said which model it is: what does not fit its number of classes is left to be refused.
    """
    table = next((key for key in TABLES if key in state), None)
    if table is None:
        return {}
    if state[table].ndim != 2 or not len(state[table]):
        raise ArtifactError(
            f"{where} holds {table} of shape {tuple(state[table].shape)}; (number of labels, width) was expected. It is "
            "damaged, or of another model."
        )
    rows, num_classes = len(state[table]), given.get("num_classes")
    without_null, with_null = (
        {"num_classes": rows, "class_dropout_prob": 0.0},
        {"num_classes": rows - 1},
    )
    if "class_dropout_prob" in given:
        return (
            {} if named else {"num_classes": rows if given["class_dropout_prob"] == 0 else rows - 1}
        )
    if rows == num_classes:
        return without_null
    if rows - 1 == num_classes:
        return with_null
    if named:
        return {}
    if rows == 1:
        return without_null
    warn(
        f"{where} has {rows} labels, which may be {rows - 1} classes and the null label of classifier-free guidance, or {rows} classes "
        f"trained without it (class_dropout_prob=0). It is read as {rows - 1} classes and the null label: give "
        f"num_classes={rows} if it is the other, num_classes={rows - 1} to confirm."
    )
    return with_null
