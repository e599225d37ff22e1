"""Fréchet distance of two normal distributions.

Dowson and Landau 1982; FID: Heusel et al. 1706.08500, equation 6.

tr (A B)^1/2 is the sum of the square roots of the eigenvalues of L' B L, where A = L L'. The
matrix is symmetric, so the eigenvalues are real and their computation is backward stable. A
general square root of A B (scipy's ``sqrtm``, as published) agrees where it converges; elsewhere
it returns complex numbers or, for singular A B, garbage.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def frechet_distance(mu_a: Any, sigma_a: Any, mu_b: Any, sigma_b: Any) -> Tensor:
    """Return |mu_a - mu_b|^2 + tr(sigma_a + sigma_b - 2 (sigma_a sigma_b)^1/2).

    float64, >= 0 up to rounding. Singular covariances, from fewer samples than dimensions, need no
    special treatment: the published evaluator adds 1e-6 to the diagonals only if its square root is
    not finite, and this one is always finite.

    Args:
        mu_a: Mean (D,), tensor or array.
        sigma_a: Covariance (D, D), symmetric and positive semi-definite.
        mu_b: Mean (D,).
        sigma_b: Covariance (D, D).

    Raises:
        ValueError: for shapes that do not match, and for values that are not finite.

    Example:
        >>> import torch
        >>> from tinyfusion_pl.metrics.functional import frechet_distance
        >>> identity = torch.eye(2)  # the result is 2 + 2 (1 + 4 - 2 * 2)
        >>> frechet_distance(torch.zeros(2), identity, torch.ones(2), 4 * identity).item()
        4.0
    """
    mu_a, sigma_a, mu_b, sigma_b = (
        torch.as_tensor(x).double() for x in (mu_a, sigma_a, mu_b, sigma_b)
    )
    _check(mu_a, sigma_a, mu_b, sigma_b)
    # Covariances from sums over samples are symmetric only up to rounding.
    sigma_a, sigma_b = (sigma_a + sigma_a.T) / 2, (sigma_b + sigma_b.T) / 2
    factor, other = _factor(sigma_a, sigma_b)  # (D, R), (D, D)
    eigenvalues = torch.linalg.eigvalsh(factor.T @ other @ factor)  # (R,)
    trace_of_root = eigenvalues.clamp_min(0).sqrt().sum()
    return (mu_a - mu_b).square().sum() + sigma_a.trace() + sigma_b.trace() - 2 * trace_of_root


def _factor(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return L (D, R) with L L' one of the covariances, and the other covariance (D, D).

    L is the Cholesky factor of a regular one. If both are singular, it comes from the eigenvectors
    of the first, which takes several times as long.
    """
    for sigma, other in ((a, b), (b, a)):
        lower, failed = torch.linalg.cholesky_ex(sigma)
        if not failed:
            return lower, other
    eigenvalues, vectors = torch.linalg.eigh(a)
    kept = eigenvalues > eigenvalues[-1].clamp_min(0) * len(a) * torch.finfo(a.dtype).eps
    return vectors[:, kept] * eigenvalues[kept].sqrt(), b


def _check(mu_a: Tensor, sigma_a: Tensor, mu_b: Tensor, sigma_b: Tensor) -> None:
    d = mu_a.shape[0] if mu_a.ndim == 1 else -1
    given = {"mu_a": mu_a, "sigma_a": sigma_a, "mu_b": mu_b, "sigma_b": sigma_b}
    if [tuple(x.shape) for x in given.values()] != [(d,), (d, d)] * 2:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in given.items())
        raise ValueError(
            f"Expected two means (D,) and two covariances (D, D) of the same D, got {shapes}. "
            "Statistics of different feature networks cannot be compared."
        )
    if wrong := [name for name, x in given.items() if not torch.isfinite(x).all()]:
        raise ValueError(
            f"{', '.join(wrong)} holds values that are not finite: so do the features behind it, "
            "or there was only one image."
        )
