"""Which label a class folder's name means: ImageNet's own numbers for its wnids, a mapping that is given, or the order of the names."""

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

IMAGENET, ORDER, FILE, GIVEN = "imagenet", "order", "file", "class_to_idx"  # how labels came about
WNIDS = Path(__file__).parents[1] / "assets" / "imagenet1k_wnids.txt"
MAX_LABEL = 2**31


@cache
def imagenet_wnids() -> dict[str, int]:
    """Wnid -> label, 0 to 999, of ImageNet's (ILSVRC 2012) classes: their alphabetical order."""
    return {wnid: number for number, wnid in enumerate(WNIDS.read_text().split())}


def label_classes(
    names: Sequence[str],
    *,
    class_to_idx: str | os.PathLike | None,
    where: str,
    own: Sequence[int] | None = None,
) -> tuple[list[int], str, list[str]]:
    """The label of each of the classes `names`.

    Args:
        names: Of class folders, in their order.
        class_to_idx: ``"imagenet"``: the names are wnids; ``"order"``: 0, 1, ... in the order given; a JSON file with ``{name: label}``;
            None: ImageNet's labels where all names are its wnids, else their order.
        where: The names are from, for messages.
        own: Labels that `where` itself says; they stand in the place of the order.

    Returns:
        Labels, how they came about (`IMAGENET`, `ORDER`, `FILE` or `GIVEN`), and sentences on what else they could be.

    Raises:
        ValueError, ArtifactError: for names that the mapping lacks, or when some names are ImageNet's wnids and some are not.
    """
    known = imagenet_wnids()
    others = [name for name in names if name not in known]
    order, kind = (list(range(len(names))), ORDER) if own is None else (list(own), FILE)
    if class_to_idx is None:
        if not others and names:
            return [known[name] for name in names], IMAGENET, []
        if len(others) < len(names):
            raise ValueError(
                f"{len(names) - len(others)} of the {len(names)} classes of {where} are ImageNet's wnids, others are not "
                f"({named(others)}), so their labels may be ImageNet's or their order. Give class_to_idx=order, or "
                "class_to_idx=FILE, a JSON file {name: label}; or remove the others."
            )
        return order, kind, _other_readings(names, where) if own is None else []
    if str(class_to_idx) == ORDER:
        return order, GIVEN, []
    if str(class_to_idx) == IMAGENET:
        if others:
            raise ValueError(
                f"class_to_idx=imagenet, but {len(others)} of the {len(names)} classes of {where} are no wnids of ImageNet's "
                f"1000 classes ({named(others)}). Give class_to_idx=FILE, a JSON file {{name: label}}."
            )
        return [known[name] for name in names], IMAGENET, []
    if not isinstance(class_to_idx, (str, os.PathLike)) or not (
        os.path.lexists(class_to_idx) or Path(class_to_idx).suffix
    ):
        raise ValueError(
            f"class_to_idx is {class_to_idx!r}; give 'imagenet', 'order', or a JSON file {{name of a class folder: label}}."
        )
    mapping = read_mapping(class_to_idx)
    if lacking := [name for name in names if name not in mapping]:
        raise ValueError(
            f"{class_to_idx} has no label for {len(lacking)} of the {len(names)} classes of {where} ({named(lacking)}). It "
            f"names {len(mapping)} ({named(list(mapping))})."
        )
    return [mapping[name] for name in names], GIVEN, _shared_labels(names, mapping, class_to_idx)


def relabel(
    labels: np.ndarray, old: Sequence[int], new: Sequence[int], *, where: str
) -> np.ndarray:
    """Labels (N,) int64 with each of the classes' `old` labels replaced by its `new` one.

    Raises:
        ArtifactError: when a label is no class's, or of two classes that get different ones.
    """
    new_of: dict[int, int] = {}
    for before, after in zip(old, new):
        if new_of.setdefault(before, after) != after:
            raise ArtifactError(
                f"{where} gives two classes the label {before}, so class_to_idx cannot tell them apart. Extract it again "
                "with extract.class_to_idx."
            )
    values, places = np.unique(labels, return_inverse=True)
    if unknown := [value for value in values.tolist() if value not in new_of]:
        raise ArtifactError(
            f"{where} has the label {unknown[0]}, which is none of its {len(old)} classes."
        )
    return np.array([new_of[value] for value in values.tolist()], dtype=np.int64)[
        places.reshape(-1)
    ]


def read_mapping(path: str | os.PathLike) -> dict[str, int]:
    """``{name: label}`` of a JSON file.

    Raises:
        ArtifactError: when it is missing or something else.
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
            f"{path} is not a JSON file ({error}). Give a JSON object {{name of a class folder: label}}."
        ) from error
    if not isinstance(mapping, dict) or not mapping:
        raise ArtifactError(
            f"{path} is no mapping. Give a JSON object {{name of a class folder: label}}."
        )
    for name, label in mapping.items():
        if type(label) is not int or not 0 <= label < MAX_LABEL:
            raise ArtifactError(
                f"{path} gives {name!r} the label {str(label)[:40]!r}; labels are whole numbers 0, 1, ..."
            )
    return mapping


def _unrepeated(path: str | os.PathLike, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; where a name comes twice, json itself takes the last silently."""
    if repeated := [name for name, num in Counter(name for name, _ in pairs).items() if num > 1]:
        raise ArtifactError(
            f"{path} names {named(repeated)} twice. Leave one label for each class."
        )
    return dict(pairs)


def _shared_labels(
    names: Sequence[str], mapping: dict[str, int], path: str | os.PathLike
) -> list[str]:
    """A sentence where a mapping makes one class of several."""
    shared = {label for label, num in Counter(mapping[name] for name in names).items() if num > 1}
    if not shared:
        return []
    first = next(mapping[name] for name in names if mapping[name] in shared)
    of_first = named([name for name in names if mapping[name] == first])
    return [
        f"{path} gives one label to several classes, {len(shared)} times ({of_first}: {first}): they become one class."
    ]


def _other_readings(names: Sequence[str], where: str) -> list[str]:
    """What labels by order could be besides."""
    remedy = "class_to_idx=FILE, a JSON file {name: label}, gives other labels."
    if names and all(name[:9].lower() in imagenet_wnids() for name in names):
        return [
            f"The class folders of {where} begin with ImageNet's wnids ({named(list(names))}), but are no wnids, and are labelled in "
            f"their order. Rename them to their wnids for ImageNet's labels; or {remedy}"
        ]
    if all(is_number(name) for name in names):
        if [int(name) for name in names] != list(range(len(names))):
            return [
                f"The class folders of {where} are numbers, but not 0 to {len(names) - 1}: {names[0]} gets the label 0, {names[-1]} "
                f"gets {len(names) - 1}. If the numbers are the labels, {remedy}"
            ]
        if list(names) != sorted(names):
            return [
                f"The class folders of {where} are labelled by number; torchvision's ImageFolder sorts them as text (10 before 2). "
                f"For a model that was trained on that order, {remedy}"
            ]
    elif list(names) != sorted(names, key=by_number):
        one, other = next((a, b) for a, b in zip(names, sorted(names, key=by_number)) if a != b)
        return [
            f"The class folders of {where} are labelled in the order of their names as text, as torchvision does: {one} comes before "
            f"{other}. If their numbers are meant to count, {remedy}"
        ]
    return []


def disagreement(
    names: Sequence[str], labels: Sequence[int], *, kind: str, num_classes: int
) -> tuple[str, bool] | None:
    """Why labels of `names` may not be the classes of a model with `num_classes`, and whether that is certain; None when they are.

    Where labels were given, or are ImageNet's, they are believed.
    """
    if kind in (GIVEN, IMAGENET) or len(names) == 0:
        return None
    known = imagenet_wnids()
    if all(name in known for name in names) and (right := [known[name] for name in names]) != list(
        labels
    ):
        if num_classes >= len(known):
            return (
                f"its classes are ImageNet's wnids, but their labels are {_brief(labels)} instead of {_brief(right)}",
                True,
            )
        return None
    if max(labels) + 1 < num_classes:
        how = "in the order of their names" if kind == ORDER else "as the file says"
        return (
            f"it has {len(names)} classes, labelled {_brief(labels)} {how}, and the model has {num_classes}: these labels may be "
            "another's",
            False,
        )
    return None


def _brief(labels: Sequence[int]) -> str:
    labels = [int(label) for label in np.asarray(labels)]
    if labels == list(range(labels[0], labels[0] + len(labels))) and len(labels) > 2:
        return f"{labels[0]} to {labels[-1]}"
    return ", ".join(map(str, labels[:10])) + (", ..." if len(labels) > 10 else "")
