"""Labels of class folders: ImageNet's for its wnids, a given mapping, or the order of the names."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from tinyfusion_pl.arrays import check_regular
from tinyfusion_pl.artifacts import ArtifactError
from tinyfusion_pl.data.listing import by_number, is_number, named

IMAGENET, ORDER, FILE, GIVEN = "imagenet", "order", "file", "class_to_idx"  # sources of labels
WNIDS = Path(__file__).parents[1] / "assets" / "imagenet1k_wnids.txt"
MAX_LABEL = 2**31


@cache
def imagenet_wnids() -> dict[str, int]:
    """Return wnid -> label, 0 to 999, of the ILSVRC 2012 classes, in alphabetical order."""
    return {wnid: number for number, wnid in enumerate(WNIDS.read_text().split())}


def label_classes(
    names: Sequence[str],
    *,
    class_to_idx: str | os.PathLike | None,
    where: str,
    own: Sequence[int] | None = None,
) -> tuple[list[int], str, list[str]]:
    """Return the label of each of the classes `names`.

    Args:
        names: Names of class folders, in order.
        class_to_idx: ``"imagenet"``: the names are wnids. ``"order"``: 0, 1, ... in the given
            order. Otherwise a JSON file with ``{name: label}``. None: ImageNet's labels if all
            names are its wnids, else their order.
        where: Source of the names, for messages.
        own: Labels recorded in `where`, used in place of the order.

    Returns:
        Labels, their source (`IMAGENET`, `ORDER`, `FILE` or `GIVEN`), and warnings about other
        possible labels.

    Raises:
        ValueError: if only some of the names are wnids of ImageNet.
        ArtifactError: if the mapping lacks names or cannot be read.
    """
    known = imagenet_wnids()
    others = [name for name in names if name not in known]
    order, kind = (list(range(len(names))), ORDER) if own is None else (list(own), FILE)
    if class_to_idx is None:
        if not others and names:
            return [known[name] for name in names], IMAGENET, []
        if len(others) < len(names):
            raise ValueError(
                f"{len(names) - len(others)} of the {len(names)} classes of {where} are wnids of "
                f"ImageNet, but others are not ({named(others)}), so their labels are ambiguous. "
                "Give class_to_idx=order, or class_to_idx=FILE, a JSON file {name: label}; or "
                "remove the others."
            )
        return order, kind, _other_readings(names, where) if own is None else []
    if str(class_to_idx) == ORDER:
        return order, GIVEN, []
    if str(class_to_idx) == IMAGENET:
        if others:
            raise ValueError(
                f"class_to_idx=imagenet, but {len(others)} of the {len(names)} classes of {where} "
                f"are not wnids of ImageNet's 1000 classes ({named(others)}). Give "
                "class_to_idx=FILE, a JSON file {name: label}."
            )
        return [known[name] for name in names], IMAGENET, []
    if not isinstance(class_to_idx, (str, os.PathLike)) or not (
        os.path.lexists(class_to_idx) or Path(class_to_idx).suffix
    ):
        raise ValueError(
            f"class_to_idx is {class_to_idx!r}; give 'imagenet', 'order', or a JSON file "
            "{name of a class folder: label}."
        )
    mapping = read_mapping(class_to_idx)
    if lacking := [name for name in names if name not in mapping]:
        raise ValueError(
            f"{class_to_idx} has no label for {len(lacking)} of the {len(names)} classes of "
            f"{where} ({named(lacking)}). It has labels for {len(mapping)} names "
            f"({named(list(mapping))})."
        )
    return [mapping[name] for name in names], GIVEN, _shared_labels(names, mapping, class_to_idx)


def relabel(
    labels: np.ndarray, old: Sequence[int], new: Sequence[int], *, where: str
) -> np.ndarray:
    """Return labels (N,) int64 with the `old` label of each class replaced by its `new` one.

    Raises:
        ArtifactError: for a label without a class, or of two classes with different new labels;
            `where` is the source that it names.
    """
    new_of: dict[int, int] = {}
    for before, after in zip(old, new):
        if new_of.setdefault(before, after) != after:
            raise ArtifactError(
                f"{where} has two classes with the label {before}, so class_to_idx cannot "
                "distinguish them. Extract it again with extract.class_to_idx."
            )
    values, places = np.unique(labels, return_inverse=True)
    if unknown := [value for value in values.tolist() if value not in new_of]:
        raise ArtifactError(
            f"{where} has the label {unknown[0]}, which is not one of its {len(old)} classes."
        )
    new_values = np.array([new_of[value] for value in values.tolist()], dtype=np.int64)
    return new_values[places.reshape(-1)]


def read_mapping(path: str | os.PathLike) -> dict[str, int]:
    """Read ``{name: label}`` from a JSON file.

    Raises:
        ArtifactError: if it is missing or invalid.
    """
    check_regular(path)
    try:
        mapping: Any = json.loads(
            Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=partial(_unrepeated, path)
        )
    except OSError as error:
        raise ArtifactError(f"Cannot read {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{path} is not a JSON file ({error}). Give a JSON object {{name of a class folder: "
            "label}."
        ) from error
    if not isinstance(mapping, dict) or not mapping:
        raise ArtifactError(
            f"{path} is not a mapping. Give a JSON object {{name of a class folder: label}}."
        )
    for name, label in mapping.items():
        if type(label) is not int or not 0 <= label < MAX_LABEL:
            raise ArtifactError(
                f"{path} maps {name!r} to {str(label)[:40]!r}; labels are integers 0, 1, ..."
            )
    return mapping


def _unrepeated(path: str | os.PathLike, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object; unlike json, which keeps the last, refuse repeated names."""
    if repeated := [name for name, num in Counter(name for name, _ in pairs).items() if num > 1]:
        raise ArtifactError(
            f"{path} names {named(repeated)} more than once. Keep one label for each class."
        )
    return dict(pairs)


def _shared_labels(
    names: Sequence[str], mapping: dict[str, int], path: str | os.PathLike
) -> list[str]:
    """Return a warning if a mapping merges classes."""
    shared = {label for label, num in Counter(mapping[name] for name in names).items() if num > 1}
    if not shared:
        return []
    first = next(mapping[name] for name in names if mapping[name] in shared)
    of_first = named([name for name in names if mapping[name] == first])
    return [
        f"{path} gives {len(shared)} labels to several classes each ({of_first}: {first}): they "
        "are merged into one class."
    ]


def _other_readings(names: Sequence[str], where: str) -> list[str]:
    """Return a warning if labels by order may not be the intended ones."""
    remedy = "class_to_idx=FILE, a JSON file {name: label}, gives other labels."
    if names and all(name[:9].lower() in imagenet_wnids() for name in names):
        return [
            f"The class folders of {where} begin with wnids of ImageNet ({named(list(names))}), "
            "but are not wnids, and are labeled in their order. Rename them to their wnids for "
            f"ImageNet's labels; or {remedy}"
        ]
    if all(is_number(name) for name in names):
        if [int(name) for name in names] != list(range(len(names))):
            return [
                f"The class folders of {where} are numbers, but not 0 to {len(names) - 1}: "
                f"{names[0]} has the label 0, {names[-1]} has {len(names) - 1}. If the numbers are "
                f"the labels, {remedy}"
            ]
        if list(names) != sorted(names):
            return [
                f"The class folders of {where} are labeled by number; torchvision's ImageFolder "
                "sorts them as text (10 before 2). For a model that was trained on that order, "
                f"{remedy}"
            ]
    elif list(names) != sorted(names, key=by_number):
        one, other = next((a, b) for a, b in zip(names, sorted(names, key=by_number)) if a != b)
        return [
            f"The class folders of {where} are labeled in the text order of their names, as in "
            f"torchvision: {one} comes before {other}. To sort them by number, {remedy}"
        ]
    return []


def disagreement(
    names: Sequence[str], labels: Sequence[int], *, kind: str, num_classes: int
) -> tuple[str, bool] | None:
    """Return why `labels` may not be the classes of a model, and whether that is certain, or None.

    Given labels and those of ImageNet are trusted.

    Args:
        names: Names of the classes.
        labels: Label of each class.
        kind: Source of the labels; see `label_classes`.
        num_classes: Number of classes of the model.
    """
    if kind in (GIVEN, IMAGENET) or len(names) == 0:
        return None
    known = imagenet_wnids()
    right = [known.get(name) for name in names]
    if None not in right and right != list(labels):
        if num_classes < len(known):
            return None
        message = (
            f"its classes are wnids of ImageNet, but their labels are {_brief(labels)} instead of "
            f"{_brief([known[name] for name in names])}"
        )
        return message, True
    if max(labels) + 1 < num_classes:
        how = "in the order of their names" if kind == ORDER else "as recorded in the file"
        message = (
            f"it has {len(names)} classes, labeled {_brief(labels)} {how}, but the model has "
            f"{num_classes}: the labels may not be those of the model"
        )
        return message, False
    return None


def _brief(labels: Sequence[int]) -> str:
    labels = [int(label) for label in np.asarray(labels)]
    if labels == list(range(labels[0], labels[0] + len(labels))) and len(labels) > 2:
        return f"{labels[0]} to {labels[-1]}"
    return ", ".join(map(str, labels[:10])) + (", ..." if len(labels) > 10 else "")
