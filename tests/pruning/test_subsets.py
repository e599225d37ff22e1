"""The distribution over k-subsets, held against listing all of them."""

import itertools
import math

import pytest
import torch

from tinyfusion_pl.pruning.subsets import SubsetDistribution

CASES = [(1, 1), (4, 2), (6, 1), (7, 6), (9, 4), (12, 6), (5, 0), (5, 5)]


def listed(n, k):
    rows = torch.zeros(math.comb(n, k), n)
    for row, members in zip(rows, itertools.combinations(range(n), k)):
        row[list(members)] = 1
    return rows


def theta_of(n, scale=2.0):
    return scale * torch.randn(n, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("n, k", CASES)
def test_probabilities_marginals_and_entropy_equal_those_by_enumeration(n, k):
    theta, rows = theta_of(n), listed(n, k)
    p = (rows.double() @ theta.double()).softmax(0)
    distribution = SubsetDistribution(theta, k)
    torch.testing.assert_close(distribution.log_prob(rows).exp(), p)
    torch.testing.assert_close(distribution.marginals(), p @ rows.double())
    assert distribution.entropy() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-9)


@pytest.mark.parametrize("n, k", CASES)
def test_the_most_probable_subsets_are_those_by_enumeration(n, k):
    theta, rows = theta_of(n), listed(n, k)
    p = rows.double() @ theta.double()
    top = SubsetDistribution(theta, k).most_probable(10)
    assert len(top) == min(10, len(rows)) == len({tuple(row.tolist()) for row in top})
    torch.testing.assert_close(
        top.double() @ theta.double(), p.sort(descending=True).values[: len(top)]
    )


def test_sampling_frequencies_are_the_probabilities():
    theta, rows = theta_of(6, 1.0), listed(6, 3)
    p = (rows.double() @ theta.double()).softmax(0)
    samples = SubsetDistribution(theta, 3).sample(
        40_000, generator=torch.Generator().manual_seed(0)
    )
    assert (samples.sum(1) == 3).all()
    codes = samples.long() @ (2 ** torch.arange(6))
    found = torch.stack(
        [(codes == (row.long() @ (2 ** torch.arange(6)))).double().mean() for row in rows]
    )
    assert ((found - p).abs() < 5 * (p * (1 - p) / 40_000).sqrt() + 1e-9).all()


def test_nineteen_of_fifty_seven_neither_overflows_nor_loses_mass():
    distribution = SubsetDistribution(
        30 * torch.randn(57, dtype=torch.float32, generator=torch.Generator().manual_seed(1)), 19
    )
    assert distribution.marginals().sum().item() == pytest.approx(19, abs=1e-6)
    assert (distribution.sample(50).sum(1) == 19).all() and math.isfinite(distribution.entropy())


def test_subset_minus_marginals_is_the_gradient_of_the_log_probability():
    theta = theta_of(8).double().requires_grad_()
    subset = listed(8, 3)[11:12]
    log_p = subset.double() @ theta - torch.logsumexp(listed(8, 3).double() @ theta, 0)
    (expected,) = torch.autograd.grad(log_p.sum(), theta)
    torch.testing.assert_close(
        subset[0].double() - SubsetDistribution(theta, 3).marginals(), expected
    )


@pytest.mark.parametrize(
    "theta, k, message",
    [
        (torch.zeros(3), 4, "from 0 to 3"),
        (torch.zeros(3), -1, "from 0 to 3"),
        (torch.tensor([0.0, float("nan")]), 1, "finite"),
    ],
)
def test_what_is_no_distribution_is_refused(theta, k, message):
    with pytest.raises(ValueError, match=message):
        SubsetDistribution(theta, k)
