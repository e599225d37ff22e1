"""Improved precision and recall (Kynkäänniemi et al. 1904.06991), as the ADM evaluator computes them."""

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
    """Precision, the share of `samples` inside the manifold of `reference`, and recall, the reverse (float64, 0 to 1).

    A set's manifold is the union of balls around its points, each reaching to the point's k-th nearest neighbour other than itself (squared
    distances, <=). Published: k = 3, 10,000 reference images, 50,000 samples, InceptionV3's pooled features.

    Args:
        reference, samples: Features (N, D), (M, D), tensors or arrays; N and M at least k + 1.
        k: Neighbours, >= 1.
        precision: Of the distances: ``"float32"``, ``"float64"``, or ``"adm_float16"``, which rounds features, norms and products to half
            precision as the ADM evaluator does and falls back on float32 for a block of distances that is not finite. It works on copies
            of the features in half precision.
        max_block_mib: Memory for distances at once, in MiB, beside the features themselves; they are computed in blocks of rows.

    Raises:
        ValueError: for shapes that do not fit, too few points, or features that are not finite.
    """
    check_options(k, precision, max_block_mib)
    reference, samples = torch.as_tensor(reference), torch.as_tensor(samples)
    if reference.ndim != 2 or samples.ndim != 2 or reference.shape[1] != samples.shape[1]:
        raise ValueError(
            f"Features are (N, D) and (M, D) with the same D; given are {tuple(reference.shape)} and {tuple(samples.shape)}."
        )
    half, budget = precision == "adm_float16", max_block_mib * 2**20
    for name, x in (("reference", reference), ("generated", samples)):
        if len(x) <= k:
            raise ValueError(
                f"Precision and recall with k={k} neighbours need {k + 1} or more {name} images and have {len(x)}."
            )
        if num_wrong := sum(
            int((~torch.isfinite(rows)).any(1).sum()) for rows in _parts(x, budget)
        ):
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
    """Raise the ValueError that `precision_recall` would raise for these options."""
    if k < 1:
        raise ValueError(f"k is {k}; give at least 1 neighbour (published: 3).")
    if precision not in PRECISIONS:
        raise ValueError(
            f"precision is {precision!r}; give one of {', '.join(map(repr, PRECISIONS))}."
        )
    if max_block_mib < 1:
        raise ValueError(f"max_block_mib is {max_block_mib}; give at least 1.")


def _radii(x: Tensor, k: int, *, half: bool, budget: int) -> Tensor:
    """The squared distance (N,) of each point to its k-th nearest other one: it counts itself, so the (k + 1)-th smallest."""
    return torch.cat(
        [
            distances.topk(k + 1, dim=1, largest=False).values[:, -1]
            for _, distances in _blocks(x, x, half=half, budget=budget)
        ]
    )


def _blocks(a: Tensor, b: Tensor, *, half: bool, budget: int) -> Iterator[tuple[slice, Tensor]]:
    """Squared distances of consecutive rows of `a` to all of `b`: (slice, (R, M)), R as many as `budget` bytes allow."""
    num_rows = max(
        1, budget // (3 * b.element_size() * len(b))
    )  # distances, product and a comparison at once
    whole = [(x, _squared_norms(x, budget)) for x in (a, b)]
    halves = [(x := whole.half(), _squared_norms(x, budget)) for whole in (a, b)] if half else None
    for start in range(0, len(a), num_rows):
        rows = slice(start, start + num_rows)
        distances = _squared_distances(*halves, rows) if halves else None  # (R, M)
        if distances is None or not torch.isfinite(distances).all():
            distances = _squared_distances(*whole, rows)  # (R, M)
        yield rows, distances.to(a.dtype)


def _squared_norms(x: Tensor, budget: int) -> Tensor:
    """(N,) of the rows of `x`."""
    return torch.cat([rows.square().sum(1) for rows in _parts(x, budget)])


def _parts(x: Tensor, budget: int) -> Sequence[Tensor]:
    """Consecutive rows of `x`, so many at once that what is made of them takes no more than `budget` bytes."""
    return x.split(max(1, budget // max(1, x.element_size() * x.shape[1])))


def _squared_distances(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], rows: slice) -> Tensor:
    """Of `rows` of the points `a` to all points `b` (R, M); each side as (points, squared norms)."""
    (x, x_norms), (y, y_norms) = a, b
    product = x[rows] @ y.T  # (R, M)
    return product.mul_(-2).add_(x_norms[rows].unsqueeze(1)).add_(y_norms).clamp_min_(0)
