"""What docs/evaluation.md says equals what in other tools, with random weights or made-up features, since none are downloaded here."""

import pytest
import torch
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_full
from torchmetrics.image.fid import FrechetInceptionDistance

from tinyfusion_pl.metrics import FrechetDistance, InceptionFeatures
from tinyfusion_pl.metrics.functional import inception_score, precision_recall


def made_up(num, dim, *, seed):
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed)) * torch.linspace(
        0.2, 2, dim
    )


def test_features_are_torchmetrics_without_antialias_and_not_those_with_it(weights_path):
    image = torch.randint(0, 256, (1, 3, 600, 450), dtype=torch.uint8)
    ours = InceptionFeatures(weights_path)(image).features
    theirs = {
        antialias: FrechetInceptionDistance(
            feature_extractor_weights_path=str(weights_path), antialias=antialias
        ).inception(image)
        for antialias in (False, True)
    }
    torch.testing.assert_close(ours, theirs[False].view_as(ours), rtol=1e-5, atol=0)
    assert (ours - theirs[True]).norm() > 0.1 * ours.norm()


def test_fid_is_that_of_torch_fidelity_and_of_torchmetrics_whose_result_is_float32():
    real, made = made_up(400, 32, seed=0), made_up(300, 32, seed=1) + 0.1
    metric = FrechetDistance(32)
    metric.update(real, real=True)
    metric.update(made)
    ours = metric.compute()
    sides = [
        {"mu": x.mean(0).numpy(), "sigma": x.T.cov().numpy()}
        for x in (real.double(), made.double())
    ]
    assert ours.item() == pytest.approx(
        fid_statistics_to_metric(*sides, verbose=False)["frechet_inception_distance"], rel=1e-9
    )
    theirs = FrechetInceptionDistance(feature=_Identity(), input_img_size=(32,))
    theirs.update(real, real=True)
    theirs.update(made, real=False)
    assert ours.dtype == torch.float64 and theirs.compute().dtype == torch.float32
    assert ours.item() == pytest.approx(theirs.compute().item(), rel=1e-5)


class _Identity(torch.nn.Module):
    num_features = 32

    def forward(self, x):
        return x.view(-1, 32)


def test_inception_score_is_that_of_torch_fidelity_with_as_many_blocks_and_no_shuffling():
    logits = made_up(120, 10, seed=2).sort(0).values  # an order that matters
    theirs = {
        shuffle: isc_features_to_metric(logits, splits=6, shuffle=shuffle)["inception_score_mean"]
        for shuffle in (False, True)
    }
    assert inception_score(logits, block_size=20).item() == pytest.approx(theirs[False], rel=1e-9)
    assert inception_score(logits, block_size=20).item() != pytest.approx(theirs[True], rel=1e-2)


def test_precision_and_recall_are_those_of_torch_fidelity_of_the_same_features():
    real, made = made_up(90, 6, seed=3), made_up(70, 6, seed=4) + 0.5
    assert [x.item() for x in precision_recall(real, made)] == pytest.approx(
        calculate_precision_recall_full(made, real), rel=1e-6
    )
