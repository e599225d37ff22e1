"""Improved precision and recall (Kynkäänniemi et al. 1904.06991), as in the ADM evaluator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

PRECISIONS = ("float32", "float64", "adm_float16")


def precision_recall(
    reference: Any,
    samples: Any,
    k: int = 3,
    precision: str = "float32",
    *,
    max_block_mib: int = 256,
) -> tuple[Tensor, Tensor]:
    """Return precision and recall, float64, 0 to 1.

    Precision is the share of `samples` inside the manifold of `reference`, and recall the reverse.
    The manifold of a set is the union of balls around its points; the radius is the squared
    distance to the k-th nearest other point, inclusive. Published: k = 3, 10,000 reference images,
    50,000 samples, pooled features of InceptionV3.

    Args:
        reference: Features (N, D), N > k, tensor or array.
        samples: Features (M, D), M > k, tensor or array.
        k: Number of neighbors, >= 1.
        precision: Precision of the distances: ``"float32"``, ``"float64"``, or ``"adm_float16"``,
            which rounds features, norms and products to half precision, as the ADM evaluator does,
            and falls back to float32 for a block of distances that is not finite. It copies the
            features in half precision.
        max_block_mib: Memory for distances at a time, in MiB, besides the features. Distances are
            computed in blocks of rows.

    Raises:
        ValueError: for shapes that do not match, too few points, or features that are not finite.
    """
    check_options(k, precision, max_block_mib)
    reference, samples = torch.as_tensor(reference), torch.as_tensor(samples)
    if reference.ndim != 2 or samples.ndim != 2 or reference.shape[1] != samples.shape[1]:
        raise ValueError(
            "Expected features (N, D) and (M, D) with the same D, got "
            f"{tuple(reference.shape)} and {tuple(samples.shape)}."
        )
    half, budget = precision == "adm_float16", max_block_mib * 2**20
    for name, x in (("reference", reference), ("generated", samples)):
        if len(x) <= k:
            raise ValueError(
                f"Precision and recall with k={k} neighbors need {k + 1} or more {name} images, "
                f"got {len(x)}."
            )
        num_wrong = sum(int((~torch.isfinite(rows)).any(1).sum()) for rows in _parts(x, budget))
        if num_wrong:
            raise ValueError(f"The features of {num_wrong} {name} images are not finite.")
    dtype = torch.float64 if precision == "float64" else torch.float32
    reference, samples = reference.to(dtype), samples.to(dtype)
    reference_radii, sample_radii = (
        _radii(x, k, half=half, budget=budget) for x in (reference, samples)
    )
    covered = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    num_inside = torch.zeros((), dtype=torch.long, device=reference.device)
    for rows, distances in _blocks(samples, reference, half=half, budget=budget):  # (R, N)
        num_inside += (distances <= reference_radii).any(1).sum()
        covered |= (distances <= sample_radii[rows].unsqueeze(1)).any(0)
    return num_inside.double() / len(samples), covered.double().mean()


def check_options(k: int, precision: str, max_block_mib: int) -> None:
    """Raise the `ValueError` that `precision_recall` would raise for these options."""
    if k < 1:
        raise ValueError(f"k is {k}; give at least 1 neighbor (published: 3).")
    if precision not in PRECISIONS:
        raise ValueError(
            f"precision is {precision!r}; give one of {', '.join(map(repr, PRECISIONS))}."
        )
    if max_block_mib < 1:
        raise ValueError(f"max_block_mib is {max_block_mib}; give at least 1.")


def _radii(x: Tensor, k: int, *, half: bool, budget: int) -> Tensor:
    """Return the squared distance (N,) of each point to its k-th nearest other point."""
    nearest = [  # k + 1 because each point counts itself
        distances.topk(k + 1, dim=1, largest=False).values[:, -1]
        for _, distances in _blocks(x, x, half=half, budget=budget)
    ]
    return torch.cat(nearest)


def _blocks(a: Tensor, b: Tensor, *, half: bool, budget: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of `a` and their squared distances (R, M) to `b`; `budget` in bytes."""
    # Distances, product and a comparison are in memory at the same time.
    num_rows = max(1, budget // (3 * b.element_size() * len(b)))
    whole_a, whole_b = _with_norms(a, budget), _with_norms(b, budget)
    if half:
        half_a, half_b = _with_norms(a.half(), budget), _with_norms(b.half(), budget)
    for start in range(0, len(a), num_rows):
        rows = slice(start, start + num_rows)
        distances = _squared_distances(half_a, half_b, rows) if half else None  # (R, M)
        if distances is None or not torch.isfinite(distances).all():
            distances = _squared_distances(whole_a, whole_b, rows)  # (R, M)
        yield rows, distances.to(a.dtype)


def _with_norms(x: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    return x, _squared_norms(x, budget)


def _squared_norms(x: Tensor, budget: int) -> Tensor:
    """Return the squared norm (N,) of each row."""
    return torch.cat([rows.square().sum(1) for rows in _parts(x, budget)])


def _parts(x: Tensor, budget: int) -> Sequence[Tensor]:
    """Split `x` into runs of rows that take no more than `budget` bytes each."""
    return x.split(max(1, budget // max(1, x.element_size() * x.shape[1])))


def _squared_distances(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], rows: slice) -> Tensor:
    """Return distances (R, M) of `rows` of a to all of b; each side is (points, squared norms)."""
    (x, x_norms), (y, y_norms) = a, b
    product = x[rows] @ y.T  # (R, M)
    return product.mul_(-2).add_(x_norms[rows].unsqueeze(1)).add_(y_norms).clamp_min_(0)
