"""Each number against an independent computation."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tinyfusion_pl.metrics.functional import (
    frechet_distance,
    gaussian_mmd,
    inception_score,
    kernel_inception_distance,
    precision_recall,
)

RNG = np.random.default_rng(0)


def rows(num, dim, seed=0, shift=0.0):
    return torch.from_numpy(
        np.random.default_rng(seed).normal(size=(num, dim))
        @ np.random.default_rng(9).normal(size=(dim, dim))
        + shift
    )


def statistics(x):
    return x.mean(0), x.T.cov()


def by_square_root(a, b):
    (m, s), (n, t) = ([np.asarray(x) for x in statistics(rows)] for rows in (a, b))
    return ((m - n) ** 2).sum() + np.trace(s + t - 2 * scipy.linalg.sqrtm(s @ t).real)


def test_against_scipys_square_root():
    a, b = rows(50, 8), rows(70, 8, seed=1, shift=0.3)
    assert frechet_distance(*statistics(a), *statistics(b)).item() == pytest.approx(
        by_square_root(a, b), rel=1e-10
    )


def test_against_the_analytic_distance_of_diagonal_covariances():
    s, t = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([4.0, 1.0, 16.0])
    distance = frechet_distance(torch.zeros(3), s.diag(), torch.tensor([1.0, 2.0, 0.0]), t.diag())
    assert distance.item() == pytest.approx(5 + (s.sqrt() - t.sqrt()).square().sum().item())
    assert distance.dtype == torch.float64


def test_equal_statistics_have_distance_zero_and_the_order_does_not_matter():
    a, b = statistics(rows(30, 6)), statistics(rows(30, 6, seed=1))
    assert frechet_distance(*a, *a).item() == pytest.approx(0, abs=1e-9)
    assert frechet_distance(*a, *b).item() == pytest.approx(
        frechet_distance(*b, *a).item(), rel=1e-10
    )


@pytest.mark.parametrize("num", [2, 5, 20])
def test_singular_covariances_of_few_samples_give_the_distance_of_their_limit(num):
    a, b = statistics(rows(num, 20)), statistics(rows(num + 3, 20, seed=1))
    # A little noise makes both regular; the distance is continuous.
    noise = 1e-10 * torch.eye(20, dtype=torch.float64)
    limit = (
        ((a[0] - b[0]) ** 2).sum()
        + a[1].trace()
        + b[1].trace()
        - 2 * scipy.linalg.sqrtm(np.asarray((a[1] + noise) @ (b[1] + noise))).real.trace()
    )
    assert frechet_distance(*a, *b).item() == pytest.approx(float(limit), rel=1e-4)
    assert frechet_distance(*a, *a).item() == pytest.approx(0, abs=1e-5 * a[1].trace().item())


def test_a_singular_and_a_regular_covariance_give_one_distance_in_either_order_without_eigenvectors(
    monkeypatch,
):
    few, many = statistics(rows(4, 12)), statistics(rows(300, 12, seed=1))
    monkeypatch.setattr(torch.linalg, "eigh", None)
    both = [frechet_distance(*x, *y).item() for x, y in ((few, many), (many, few))]
    lower = np.linalg.cholesky(many[1].numpy())
    root = np.sqrt(np.linalg.svd(lower.T @ few[1].numpy() @ lower, compute_uv=False)).sum()
    expected = (
        float((few[0] - many[0]).square().sum() + few[1].trace() + many[1].trace()) - 2 * root
    )
    assert both == pytest.approx([expected, expected], rel=1e-6)


def test_a_covariance_of_zeros_leaves_the_other_ones_trace():
    mean, sigma = statistics(rows(30, 4))
    assert frechet_distance(mean, torch.zeros(4, 4), mean, sigma).item() == pytest.approx(
        sigma.trace().item()
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((torch.zeros(3), torch.eye(3), torch.zeros(4), torch.eye(4)), r"mu_b \(4,\)"),
        ((torch.zeros(3), torch.eye(4), torch.zeros(3), torch.eye(3)), r"sigma_a \(4, 4\)"),
        ((torch.zeros(1, 3), torch.eye(3), torch.zeros(3), torch.eye(3)), r"mu_a \(1, 3\)"),
        (
            (torch.zeros(3), torch.eye(3) * float("nan"), torch.zeros(3), torch.eye(3)),
            "sigma_a holds values that are not finite",
        ),
    ],
)
def test_statistics_that_do_not_fit_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        frechet_distance(*given)


def score(logits):
    p = np.exp(np.asarray(logits, dtype=np.float64))
    p /= p.sum(1, keepdims=True)
    return np.exp((p * np.log(p / p.mean(0))).sum(1).mean())


def test_inception_score_is_the_mean_over_consecutive_blocks_the_last_one_short():
    logits = rows(23, 5).float()
    assert inception_score(logits).item() == pytest.approx(score(logits), rel=1e-12)
    expected = np.mean([score(logits[i : i + 10]) for i in (0, 10, 20)])
    assert inception_score(logits, block_size=10).item() == pytest.approx(expected, rel=1e-12)
    assert inception_score(logits, block_size=1).item() == pytest.approx(1)


def test_certain_and_even_samples_score_the_number_of_classes():
    assert inception_score(1000 * torch.eye(7).repeat(3, 1)).item() == pytest.approx(7)


def naive(reference, samples, k):
    def inside(points, centres):
        radii = [np.sort(((c - centres) ** 2).sum(1))[k] for c in centres]
        return np.mean(
            [any(((p - c) ** 2).sum() <= r for c, r in zip(centres, radii)) for p in points]
        )

    reference, samples = np.asarray(reference), np.asarray(samples)
    return inside(samples, reference), inside(reference, samples)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_against_the_definition(k):
    reference, samples = rows(40, 3), rows(30, 3, seed=1, shift=1.0)
    for precision in ("float32", "float64"):
        both = precision_recall(reference, samples, k, precision)
        assert [x.item() for x in both] == pytest.approx(naive(reference, samples, k))


@pytest.mark.parametrize("precision", ["float32", "float64", "adm_float16"])
def test_blocks_of_rows_give_the_numbers_of_the_whole(precision):
    reference, samples = rows(1200, 4).float(), rows(1500, 4, seed=1, shift=0.5).float()
    assert precision_recall(
        reference, samples, precision=precision, max_block_mib=1
    ) == precision_recall(reference, samples, precision=precision, max_block_mib=1024)


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that is made within; views of others make nothing."""

    num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        there = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in there:
                self.num_bytes = max(self.num_bytes, x.numel() * x.element_size())
        return made


def test_no_tensor_of_distances_or_squares_is_larger_than_the_memory_given():
    reference, samples = (
        torch.randn(1500, 400),
        torch.randn(2500, 400),
    )  # 2.3 and 3.8 MiB; all distances would take 14 and 24
    for max_block_mib in (1, 2):
        with LargestTensor() as largest:
            precision_recall(reference, samples, max_block_mib=max_block_mib)
        assert 0 < largest.num_bytes <= max_block_mib * 2**20


def test_equal_sets_are_inside_each_other_and_distant_ones_outside():
    x = rows(20, 3)
    assert [v.item() for v in precision_recall(x, x)] == [1, 1]
    assert [v.item() for v in precision_recall(x, x + 1e4)] == [0, 0]


def test_half_precision_that_overflows_falls_back_on_float32():
    reference, samples = 1e3 * rows(40, 3).float(), 1e3 * rows(30, 3, seed=1).float()
    assert precision_recall(reference, samples, precision="adm_float16") == precision_recall(
        reference, samples
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"reference": rows(3, 3)}, "need 4 or more reference images, got 3"),
        ({"samples": rows(2, 3)}, "need 4 or more generated images, got 2"),
        ({"samples": rows(9, 4)}, r"same D, got \(9, 3\) and \(9, 4\)"),
        ({"samples": rows(9, 3) / 0}, "9 generated images are not finite"),
        ({"k": 0}, "k is 0"),
        ({"precision": "float16"}, "precision is 'float16'; give one of 'float32'"),
        ({"max_block_mib": 0}, "max_block_mib is 0"),
    ],
)
def test_wrong_input_is_refused_with_the_reason(change, said):
    with pytest.raises(ValueError, match=said):
        precision_recall(**{"reference": rows(9, 3), "samples": rows(9, 3), **change})


def test_kernel_distance_against_the_unbiased_formula():
    x, y = rows(12, 4), rows(12, 4, seed=1, shift=0.2)

    def kernel(a, b):
        return (np.asarray(a) @ np.asarray(b).T / 4 + 1) ** 3

    n = 12
    expected = (
        sum((k := kernel(a, a)).sum() - np.trace(k) for a in (x, y)) / (n * (n - 1))
        - 2 * kernel(x, y).mean()
    )
    ours = kernel_inception_distance(
        x, y, num_subsets=3, subset_size=12
    )  # every subset is the whole
    assert ours.item() == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_depends_on_its_seed_alone():
    x, y = rows(30, 4), rows(30, 4, seed=1)
    torch.manual_seed(1)
    first = kernel_inception_distance(x, y, num_subsets=5, subset_size=10)
    torch.manual_seed(2)
    assert kernel_inception_distance(x, y, num_subsets=5, subset_size=10) == first
    assert kernel_inception_distance(x, y, num_subsets=5, subset_size=10, seed=1) != first
    with pytest.raises(ValueError, match="Subsets of 31 need 31 or more reference images, got 30"):
        kernel_inception_distance(x, y, subset_size=31)


def test_gaussian_mmd_against_the_double_sum():
    x, y = rows(7, 3), rows(9, 3, seed=1)

    def mean(a, b):
        return np.mean(
            [
                [np.exp(-((p - q) ** 2).sum() / (2 * 2.0**2)) for q in np.asarray(b)]
                for p in np.asarray(a)
            ]
        )

    expected = 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
    assert gaussian_mmd(x, y, sigma=2.0).item() == pytest.approx(expected, rel=1e-8)
    assert gaussian_mmd(x, x).item() == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="sigma is 0"):
        gaussian_mmd(x, y, sigma=0)


def test_arrays_are_taken_as_tensors_are():
    a, b = (torch.randn(30, 4, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    for function in (
        precision_recall,
        lambda x, y: kernel_inception_distance(x, y, num_subsets=3, subset_size=10),
        gaussian_mmd,
    ):
        assert torch.equal(
            torch.as_tensor(function(a.numpy(), b.numpy())), torch.as_tensor(function(a, b))
        )
    assert inception_score(a.numpy()) == inception_score(a)


def test_logits_that_are_not_finite_are_counted():
    logits = torch.zeros(5, 3)
    logits[2, 1] = float("nan")
    with pytest.raises(ValueError, match="logits of 1 of 5 images are not finite"):
        inception_score(logits)
