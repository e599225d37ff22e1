"""All metrics over one run of a network, against the formulas in NumPy and SciPy, in one process, in two and in three."""

import pickle
from datetime import timedelta

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.multiprocessing
from torch import nn

from tinyfusion_pl.data import DigitsDataModule
from tinyfusion_pl.metrics import (
    Features,
    FrechetDistance,
    GaussianMMD,
    GenerationMetrics,
    InceptionScore,
    KernelInceptionDistance,
    LabelAccuracy,
    PrecisionRecall,
    Reference,
    load_digits_classifier,
    read_reference,
)
from tinyfusion_pl.metrics.functional import precision_recall


class Toy(nn.Module):
    """A linear feature network of 2x2 images; counts its runs."""

    num_features, num_classes, num_spatial = 5, 3, 2

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(4, 8, generator=generator) / 100)
        self.num_runs = 0

    def forward(self, images):
        self.num_runs += 1
        x = images.flatten(1).float() @ self.weight
        return Features(x[:, :5].square(), x[:, 5:], x[:, 3:5].square())


def images(num, *, seed=0, low=0, high=256):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (num, 1, 2, 2), generator=generator, dtype=torch.uint8)


def labels(num):
    return torch.arange(num) % 3


REAL, MADE = images(40, seed=1), images(30, seed=2, low=60)


def every_metric():
    """All of them, in blocks of 7 samples, so that it matters which sample is which."""
    return {
        "fid": FrechetDistance(5),
        "sfid": FrechetDistance(2, of="spatial"),
        "inception_score": InceptionScore(3, block_size=7),
        "precision_recall": PrecisionRecall(5, k=2),
        "accuracy": LabelAccuracy(3),
        "kid": KernelInceptionDistance(5, num_subsets=4, subset_size=10),
        "mmd": GaussianMMD(3, of="logits"),
    }


@pytest.fixture
def metrics():
    metrics = GenerationMetrics(Toy())
    metrics.update_reference(REAL)
    return metrics


def frechet_distance(x, y):
    """In float64, through a matrix square root instead of eigenvalues."""
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
    real, made = network(REAL), network(made)
    logits = made.logits
    precision, recall = precision_recall(real.features, made.features)
    return {
        "fid": frechet_distance(real.features, made.features),
        "sfid": frechet_distance(real.spatial, made.spatial),
        "inception_score": inception_score(logits),
        "precision": precision.item(),
        "recall": recall.item(),
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


def test_same_images_give_distance_zero(metrics):
    metrics.update(REAL)
    assert metrics.compute()["fid"] == pytest.approx(0, abs=1e-9)


def test_real_digits_give_distance_zero_and_a_score_near_ten():
    real, y = DigitsDataModule().reference_images()
    metrics = GenerationMetrics(load_digits_classifier())
    metrics.update_reference(real)
    metrics.update(real, y)
    results = metrics.compute()
    assert results["fid"] == pytest.approx(0, abs=1e-4)
    assert results["inception_score"] > 9.5 and results["accuracy"] > 0.99


def test_reset_forgets_generated_images_and_keeps_the_reference(metrics):
    metrics.update(images(20, seed=5, high=9), labels(20))
    metrics.compute()
    metrics.reset()
    metrics.update(MADE, labels(30))
    assert metrics.compute() == pytest.approx(expected(MADE, labels(30)), rel=1e-9)


def test_reset_of_the_reference_asks_for_a_new_one(metrics):
    metrics.update(MADE)
    metrics.reset(reference=True)
    metrics.update(MADE)
    with pytest.raises(ValueError, match="needs 2 or more reference images and has 0: call update"):
        metrics.compute()


def test_without_labels_there_is_no_accuracy(metrics):
    metrics.update(MADE)
    assert list(metrics.compute()) == ["fid", "sfid", "inception_score", "precision", "recall"]


def test_global_generator_neither_matters_nor_moves():
    results = []
    for seed in range(3):
        metrics = GenerationMetrics(Toy(), metrics=every_metric())
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        metrics.update_reference(REAL)
        metrics.update(MADE, labels(30))
        results.append(metrics.compute())
        assert torch.equal(torch.get_rng_state(), state)
    assert results[0] == results[1] == results[2]


def test_any_order_of_batches_gives_the_same_numbers():
    def run(parts):
        metrics = GenerationMetrics(Toy(), metrics=every_metric())
        metrics.update_reference(REAL)
        for part in parts:
            metrics.update(MADE[part], labels(30)[part], indices=part)
        return metrics.compute()

    whole = run([torch.arange(30)])
    shuffled = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    assert run(shuffled.split(4)) == pytest.approx(whole, rel=1e-9)
    assert run(torch.arange(30).flip(0).split(11)) == pytest.approx(whole, rel=1e-9)


def test_blocks_of_the_score_are_of_the_samples_numbers():
    score = InceptionScore(3, block_size=10)
    logits = Toy().requires_grad_(False)(MADE).logits
    for part in torch.randperm(30).split(7):
        score.update(logits[part], indices=part)
    assert score.compute().item() == pytest.approx(
        np.mean([inception_score(logits[i : i + 10]) for i in (0, 10, 20)]), rel=1e-9
    )


def test_a_sample_that_is_measured_twice_is_refused_by_its_number(metrics):
    metrics.update(MADE[:20], indices=torch.arange(20))
    metrics.update(
        MADE[20:], indices=torch.arange(17, 27)
    )  # as a sampler that pads its last batch would
    with pytest.raises(
        ValueError, match=r"3 samples were measured more than once \(numbers \[17, 18, 19\]\)"
    ):
        metrics.compute()


def test_features_that_are_not_finite_are_counted_refused_and_not_added(metrics):
    features = metrics.features(MADE)
    features.features[[2, 5]] = float("nan")
    with pytest.raises(
        ValueError, match=r"2 of 30 images have features that are not finite \(positions \[2, 5\]"
    ):
        metrics.update_features(features, labels(30))
    metrics.reset()
    metrics.update(MADE, labels(30))
    assert metrics.compute() == pytest.approx(expected(MADE, labels(30)), rel=1e-9)


def reference_files(folder):
    """One for each kind of content."""
    metrics = GenerationMetrics(Toy())
    metrics.update_reference(REAL)
    given = {"statistics": metrics.statistics(), "num_images": 40}
    features = Toy().requires_grad_(False)(REAL).features
    kinds = {
        "images": {"images": REAL},
        "own": {**given, "features": features, "network": metrics.fingerprint()},
        "both": {**given, "images": REAL},
    }
    for name, content in kinds.items():
        Reference(path=folder / f"{name}.npz", **content).write()
    mean, covariance = given["statistics"]["features"]
    np.savez(folder / "statistics.npz", mu=mean.numpy(), sigma=covariance.numpy())
    return folder


@pytest.mark.parametrize("kind", ["images", "own", "both"])
def test_a_reference_file_gives_the_numbers_of_the_images_it_was_made_of(kind, tmp_path):
    metrics = GenerationMetrics(Toy())
    metrics.set_reference(read_reference(reference_files(tmp_path) / f"{kind}.npz"), batch_size=7)
    metrics.update(MADE, labels(30))
    assert metrics.compute() == pytest.approx(expected(MADE, labels(30)), rel=1e-6)
    metrics.reset()  # keeps the reference
    metrics.update(MADE, labels(30))
    assert metrics.compute() == pytest.approx(expected(MADE, labels(30)), rel=1e-6)


def test_statistics_alone_are_enough_for_distances_and_for_nothing_else(tmp_path):
    reference = read_reference(reference_files(tmp_path) / "statistics.npz")
    metrics = GenerationMetrics(Toy(), metrics={"fid": FrechetDistance(5)})
    metrics.set_reference(reference)
    metrics.update(MADE)
    assert metrics.compute() == pytest.approx({"fid": expected(MADE, labels(30))["fid"]}, rel=1e-9)
    with pytest.raises(ValueError, match="statistics of features, but '.*' needs images"):
        GenerationMetrics(Toy()).set_reference(reference)


def test_a_reference_of_other_weights_is_refused(tmp_path):
    reference = read_reference(reference_files(tmp_path) / "own.npz")
    with pytest.raises(
        ValueError, match="made with the feature network Toy-.*but this one is Toy-"
    ):
        GenerationMetrics(Toy(seed=1)).set_reference(reference)


def test_settings_hold_what_decides_a_number_and_memory_only_where_it_does():
    assert GenerationMetrics(Toy(), metrics={"pr": PrecisionRecall(5, max_block_mib=7)}).settings()[
        "pr"
    ] == {"metric": "PrecisionRecall", "of": "features", "k": 3, "precision": "float32"}
    half = GenerationMetrics(
        Toy(), metrics={"pr": PrecisionRecall(5, max_block_mib=7, precision="adm_float16")}
    )
    assert half.settings()["pr"]["max_block_mib"] == 7
    protocol = half.protocol(num_samples=3)
    assert protocol == {
        "num_samples": 3,
        "feature_network": half.fingerprint(),
        "metrics": half.settings(),
    }


def test_a_metric_of_another_width_is_refused_at_once():
    for metric, said in (
        (FrechetDistance(6), "expects 6 features, but the feature network returns 5"),
        (FrechetDistance(4, of="spatial"), "expects 4 spatial, but the feature network returns 2"),
    ):
        with pytest.raises(ValueError, match=said):
            GenerationMetrics(Toy(), metrics={"x": metric})
    with pytest.raises(ValueError, match="metrics.x is of type int"):
        GenerationMetrics(Toy(), metrics={"x": 3})


def test_each_metric_takes_plain_tensors_too():
    network = Toy().requires_grad_(False)
    metric = FrechetDistance(5)
    metric.update(network(REAL).features, real=True)
    metric.update(network(MADE).features)
    assert metric.compute().item() == pytest.approx(expected(MADE, labels(30))["fid"], rel=1e-9)
    with pytest.raises(ValueError, match=r"expects features \(N, 5\), got \(2, 4\)"):
        metric.update(torch.zeros(2, 4))


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
        (0, 5, "2 or more reference images and has 0: call update"),
        (5, 0, "2 or more generated images and has 0: call update"),
        (5, 1, "2 or more generated images and has 1"),
        (1, 5, "2 or more reference images and has 1"),
    ],
)
def test_too_few_images_are_named(num_real, num_made, message):
    metrics = GenerationMetrics(Toy())
    if num_real:
        metrics.update_reference(images(num_real))
    if num_made:
        metrics.update(images(num_made))
    with pytest.raises(ValueError, match=message):
        metrics.compute()


def test_wrong_images_are_refused_and_nothing_counted(metrics):
    for wrong, message in (
        (MADE.float() / 255, "uint8 tensors .* torch.float32"),
        (MADE[0], r"\(N, C, H, W\), got \(1, 2, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            metrics.update(wrong, labels(30))
        with pytest.raises(ValueError, match=message):
            metrics.update_reference(wrong)
    metrics.update(MADE, labels(30))
    assert metrics.compute() == pytest.approx(expected(MADE, labels(30)), rel=1e-9)


def test_wrong_labels_are_refused_and_nothing_counted(metrics):
    with pytest.raises(ValueError, match=r"30 images need labels of shape \(30,\), got \(29,\)"):
        metrics.update(MADE, labels(29))
    with pytest.raises(
        ValueError, match="range from 0 to 29, but the feature network has classes 0 to 2"
    ):
        metrics.update(MADE, torch.arange(30))
    metrics.update(MADE[:20], labels(20))
    metrics.update(MADE[20:])
    with pytest.raises(ValueError, match="20 of 30 generated images have labels"):
        metrics.compute()


def one_of_several(rank, folder, sizes):
    """Each process sees its share, in batches of its own number; all must get what one process gets of everything."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=len(sizes),
        timeout=timedelta(seconds=60),
    )
    metrics = GenerationMetrics(Toy(), metrics=every_metric())
    metrics.update_reference(REAL[rank :: len(sizes)])
    mine = torch.arange(30)[sum(sizes[:rank]) : sum(sizes[: rank + 1])]
    for _ in range(2):  # the second time after a reset
        for part in mine.split(7):
            metrics.update(MADE[part], labels(30)[part], indices=part)
        results = metrics.compute()
        assert metrics.num_samples == 30
        metrics.reset()
    try:
        metrics.update(MADE)
    except ValueError as error:
        results["unnumbered"] = str(error)
    try:
        metrics.compute()
    except ValueError as error:
        results["empty"] = str(error)
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("sizes", [(15, 15), (28, 2), (30, 0), (13, 1, 16), (0, 30, 0)])
def test_processes_give_the_numbers_of_one(tmp_path, sizes):
    whole = GenerationMetrics(Toy(), metrics=every_metric())
    whole.update_reference(REAL)
    whole.update(MADE, labels(30))
    torch.multiprocessing.start_processes(
        one_of_several, (tmp_path, sizes), nprocs=len(sizes), start_method="fork"
    )
    for rank in range(len(sizes)):
        results = torch.load(tmp_path / f"{rank}.pt")
        assert "generated images and has 0" in results.pop("empty")
        assert "numbers are required" in results.pop("unnumbered")
        assert results == pytest.approx(whole.compute(), rel=1e-9)


def test_a_reference_with_the_old_num_pictures_is_read(tmp_path):
    np.savez(tmp_path / "old.npz", mu=np.zeros(2), sigma=np.eye(2), num_pictures=np.array(7))
    assert read_reference(tmp_path / "old.npz").num_images == 7
