"""FID, Inception score and accuracy against the formulas in NumPy and SciPy, in one process and in two."""

import pickle
from datetime import timedelta

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.multiprocessing
from torch import nn

from tinyfusion_pl.data import DigitsDataModule
from tinyfusion_pl.metrics import Features, GenerationMetrics, load_digits_classifier


class Toy(nn.Module):
    """A linear feature network of 2x2 pictures; counts its runs."""

    num_features = 5

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, self.num_features + 3, generator=generator) / 100)
        self.num_runs = 0

    def forward(self, pictures):
        self.num_runs += 1
        x = pictures.flatten(1).float() @ self.weight
        return Features(x[:, :5].square(), x[:, 5:])


def pictures(num, *, seed=0, low=0, high=256):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (num, 1, 2, 2), generator=generator, dtype=torch.uint8)


def labels(num):
    return torch.arange(num) % 3


REAL, MADE = pictures(40, seed=1), pictures(30, seed=2, low=60)


@pytest.fixture
def metrics():
    metrics = GenerationMetrics(Toy())
    metrics.update_reference(REAL)
    return metrics


def frechet_distance(x, y):
    """In float64, through a matrix square root instead of torchmetrics' eigenvalues."""
    x, y = (np.asarray(a, dtype=np.float64) for a in (x, y))
    s, t = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(s @ t).real
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s + t - 2 * root)


def inception_score(logits):
    p = np.exp(np.asarray(logits, dtype=np.float64))
    p /= p.sum(1, keepdims=True)
    return np.exp((p * np.log(p / p.mean(0))).sum(1).mean())


def expected(made, y):
    network = Toy().requires_grad_(False)
    logits = network(made).logits
    return {
        "fid": frechet_distance(network(REAL).features, network(made).features),
        "inception_score": inception_score(logits),
        "accuracy": (logits.argmax(1) == y).numpy().mean(),
    }


def test_results_are_those_of_the_formulas(metrics):
    metrics.update(MADE, labels(30))
    results = metrics.compute()
    assert results == pytest.approx(expected(MADE, labels(30)), rel=1e-9)
    assert all(type(value) is float for value in results.values())


def test_results_do_not_depend_on_the_batches(metrics):
    metrics.update(MADE, labels(30))
    whole = metrics.compute()
    metrics.reset()
    for part, y in zip(MADE.split(7), labels(30).split(7), strict=True):
        metrics.update(part, y)
    assert metrics.compute() == pytest.approx(whole, rel=1e-12)


def test_network_runs_once_a_batch(metrics):
    before = metrics.feature_network.num_runs
    metrics.update(MADE[:10], labels(10))
    metrics.update(MADE[10:], labels(20))
    metrics.compute()
    assert metrics.feature_network.num_runs == before + 2


def test_same_pictures_give_distance_zero(metrics):
    metrics.update(REAL)
    assert metrics.compute()["fid"] == pytest.approx(0, abs=1e-9)


def test_real_digits_give_distance_zero_and_a_score_near_ten():
    real, y = DigitsDataModule().reference_pictures()
    metrics = GenerationMetrics(load_digits_classifier())
    metrics.update_reference(real)
    metrics.update(real, y)
    results = metrics.compute()
    assert results["fid"] == pytest.approx(0, abs=1e-4)
    assert results["inception_score"] > 9.5 and results["accuracy"] > 0.99


def test_reset_forgets_generated_pictures_and_keeps_the_reference(metrics):
    metrics.update(pictures(20, seed=5, high=9), labels(20))
    metrics.compute()
    metrics.reset()
    metrics.update(MADE, labels(30))
    assert metrics.compute() == pytest.approx(expected(MADE, labels(30)), rel=1e-9)


def test_reset_of_the_reference_asks_for_a_new_one(metrics):
    metrics.update(MADE)
    metrics.reset(reference=True)
    metrics.update(MADE)
    with pytest.raises(ValueError, match="needs 2 or more reference pictures and has 0: call update_reference"):
        metrics.compute()


def test_without_labels_there_is_no_accuracy(metrics):
    metrics.update(MADE)
    assert metrics.compute().keys() == {"fid", "inception_score"}


@pytest.mark.parametrize("num_splits", [1, 4])
def test_global_generator_neither_matters_nor_moves(num_splits):
    metrics = GenerationMetrics(Toy(), num_splits=num_splits)
    metrics.update_reference(REAL)
    results = []
    for seed in range(3):
        metrics.reset()
        metrics.update(MADE)
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        results.append(metrics.compute())
        assert torch.equal(torch.get_rng_state(), state)
    assert results[0] == results[1] == results[2]


def test_splits_are_scored_apart(metrics):
    split = GenerationMetrics(Toy(), num_splits=30)  # of one picture each: every score is 1
    split.update_reference(REAL)
    split.update(MADE)
    assert split.compute()["inception_score"] == pytest.approx(1)
    with pytest.raises(ValueError, match="num_splits is 0"):
        GenerationMetrics(Toy(), num_splits=0)


def test_pickled_in_the_middle_goes_on_the_same(metrics):
    metrics.update(MADE[:10], labels(10))
    copy = pickle.loads(pickle.dumps(metrics))
    copy.update(MADE[10:], labels(30)[10:])
    assert copy.compute() == pytest.approx(expected(MADE, labels(30)), rel=1e-9)


def test_network_stays_frozen_in_evaluation_and_in_full_precision(metrics):
    nn.Sequential(metrics).train()
    assert not any(module.training for module in metrics.modules())
    assert not any(parameter.requires_grad for parameter in metrics.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        metrics.update(MADE, labels(30))
    assert metrics.compute() == pytest.approx(expected(MADE, labels(30)), rel=1e-9)


@pytest.mark.parametrize(
    ("num_real", "num_made", "message"),
    [
        (0, 5, "2 or more reference pictures and has 0: call update_reference"),
        (5, 0, "2 or more generated pictures and has 0: call update"),
        (5, 1, "2 or more generated pictures and has 1"),
        (1, 5, "2 or more reference pictures and has 1"),
    ],
)
def test_too_few_pictures_are_named(num_real, num_made, message):
    metrics = GenerationMetrics(Toy())
    if num_real:
        metrics.update_reference(pictures(num_real))
    if num_made:
        metrics.update(pictures(num_made))
    with pytest.raises(ValueError, match=message):
        metrics.compute()


def test_wrong_pictures_are_refused_and_nothing_counted(metrics):
    for wrong, message in (
        (MADE.float() / 255, "uint8 tensors .* torch.float32"),
        (MADE[0], r"\(N, C, H, W\); these are \(1, 2, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            metrics.update(wrong, labels(30))
        with pytest.raises(ValueError, match=message):
            metrics.update_reference(wrong)
    metrics.update(MADE, labels(30))
    assert metrics.compute() == pytest.approx(expected(MADE, labels(30)), rel=1e-9)


def test_wrong_labels_are_refused_and_nothing_counted(metrics):
    with pytest.raises(ValueError, match=r"30 pictures need labels of shape \(30,\); these are \(29,\)"):
        metrics.update(MADE, labels(29))
    with pytest.raises(ValueError, match="go from 0 to 29, but the feature network names classes 0 to 2"):
        metrics.update(MADE, torch.arange(30))
    metrics.update(MADE[:20], labels(20))
    metrics.update(MADE[20:])
    with pytest.raises(ValueError, match="20 of 30 generated pictures have labels"):
        metrics.compute()


def one_of_two(rank, folder, sizes):
    """Each process sees its share, in batches of its own number; both must get what one process gets of everything."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    metrics = GenerationMetrics(Toy())
    metrics.update_reference(REAL[rank::2])
    first, last = (0, sizes[0]) if rank == 0 else (sizes[0], sum(sizes))
    for _ in range(2):  # the second time after a reset
        for part, y in zip(MADE[first:last].split(7), labels(30)[first:last].split(7), strict=True):
            metrics.update(part, y)
        results = metrics.compute()
        metrics.reset()
    try:
        metrics.compute()
    except ValueError as error:
        results["error"] = str(error)
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("sizes", [(15, 15), (28, 2), (30, 0)])
def test_two_processes_give_the_numbers_of_one(tmp_path, sizes):
    torch.multiprocessing.start_processes(one_of_two, (tmp_path, sizes), nprocs=2, start_method="fork")
    for rank in range(2):
        results = torch.load(tmp_path / f"{rank}.pt")
        assert "generated pictures and has 0" in results.pop("error")
        assert results == pytest.approx(expected(MADE, labels(30)), rel=1e-9)
