"""InceptionV3 with random weights in a file of the published layout; missing and foreign files in one sentence."""

import os
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

from tinyfusion_pl.artifacts import ArtifactError
from tinyfusion_pl.metrics import (
    FrechetDistance,
    GenerationMetrics,
    InceptionFeatures,
    InceptionScore,
)


@pytest.fixture
def empty_hub(tmp_path, monkeypatch):
    """No copy downloaded before, and no network."""

    def refuse(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    return tmp_path / "checkpoints" / Path(URL_INCEPTION_V3).name


def test_weights_file_gives_features_and_logits_of_colour_images(weights_path):
    network = InceptionFeatures(weights_path)
    features, logits, spatial = network(torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8))
    assert (
        features.shape == (2, network.num_features)
        and logits.shape == (2, 1008)
        and spatial.shape == (2, 2023)
    )
    torch.testing.assert_close(logits, features @ network.network.fc.weight.T)  # without bias
    with pytest.raises(ValueError, match="expects color images .* got grayscale images"):
        network(torch.zeros(2, 1, 32, 32, dtype=torch.uint8))


def test_downloaded_copy_is_used_without_a_network(weights_path, empty_hub):
    empty_hub.parent.mkdir()
    os.symlink(weights_path, empty_hub)
    expected = torch.load(weights_path)["fc.weight"]
    assert torch.equal(InceptionFeatures().network.fc.weight, expected)


def test_offline_error_names_url_place_and_option(empty_hub):
    with pytest.raises(ArtifactError) as error:
        InceptionFeatures()
    assert all(
        part in str(error.value)
        for part in (URL_INCEPTION_V3, str(empty_hub), "weights_path", "no route to host")
    )


def test_random_weights_are_the_same_each_time_and_say_so():
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with pytest.warns(UserWarning, match="InceptionV3 is randomly initialized.*meaningless"):
        one, two = InceptionFeatures("random"), InceptionFeatures("random")
    assert (
        torch.equal(one(images).features, two(images).features) and one(images).features.std() > 0
    )


class Code:
    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickle_with_code_in_it_is_refused_and_not_run(tmp_path):
    code = Code()
    code.path = str(tmp_path / "ran")
    torch.save({"fc.weight": code}, tmp_path / "x.pth")
    with pytest.raises(
        ArtifactError, match="x.pth does not hold the InceptionV3 weights of torch-fidelity"
    ):
        InceptionFeatures(tmp_path / "x.pth")
    assert not (tmp_path / "ran").exists()


def test_missing_truncated_and_foreign_files_are_named(tmp_path, weights_path):
    with pytest.raises(
        ArtifactError, match=f"File {tmp_path / 'missing'} with the InceptionV3 weights not found"
    ):
        InceptionFeatures(tmp_path / "missing")
    (tmp_path / "cut").write_bytes(weights_path.read_bytes()[:1_000_000])
    (tmp_path / "page").write_text("404: not found")
    torch.save({"blocks.0.weight": torch.zeros(3)}, tmp_path / "other")
    torch.save([1, 2], tmp_path / "list")
    for name in ("cut", "page", "other", "list"):
        with pytest.raises(
            ArtifactError,
            match=f"{name} does not hold the InceptionV3 weights of torch-fidelity .*again",
        ):
            InceptionFeatures(tmp_path / name)


def test_spatial_features_are_seven_channels_of_the_first_branch_of_mixed_6d_in_height_width_channel_order(
    weights_path,
):
    network, inner = InceptionFeatures(weights_path), {}
    branch = network.network.Mixed_6d.branch1x1
    branch.conv.register_forward_hook(lambda module, args, output: inner.update(conv=output))
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    spatial = network(images).spatial.view(17, 17, 7)
    maps = branch.bn(inner["conv"]).relu()  # (1, 192, 17, 17)
    for row, column, channel in ((0, 0, 0), (3, 11, 6), (16, 16, 2)):
        assert spatial[row, column, channel] == maps[0, channel, row, column]


def test_images_are_resized_as_tensorflow_1_did(weights_path):
    network, inner = InceptionFeatures(weights_path), {}
    network.network.Conv2d_1a_3x3.register_forward_pre_hook(
        lambda module, args: inner.update(x=args[0])
    )
    image = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    network(image)
    # Bilinear, no half-pixel shift, no antialias: output i looks at i * 64 / 299.
    for i, j in ((0, 0), (150, 37), (298, 298)):
        y, x = i * 64 / 299, j * 64 / 299
        y0, x0 = int(y), int(x)
        y1, x1 = min(y0 + 1, 63), min(x0 + 1, 63)
        p, v, u = image[0].double(), y - y0, x - x0
        mixed = (1 - v) * ((1 - u) * p[:, y0, x0] + u * p[:, y0, x1]) + v * (
            (1 - u) * p[:, y1, x0] + u * p[:, y1, x1]
        )
        torch.testing.assert_close(
            inner["x"][0, :, i, j].double(), (mixed - 128) / 128, atol=1e-5, rtol=0
        )


def test_labels_give_no_accuracy_since_inceptions_classes_are_in_an_order_of_their_own(
    weights_path,
):
    metrics = GenerationMetrics(InceptionFeatures(weights_path))
    assert metrics.names == ["fid", "sfid", "inception_score", "precision_recall"]


@pytest.mark.slow
def test_generation_metrics_run_over_inception(weights_path):
    network = InceptionFeatures(weights_path)
    fid, score = FrechetDistance(2048), InceptionScore(1008)
    metrics = GenerationMetrics(network, metrics={"fid": fid, "inception_score": score})
    real = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    metrics.update_reference(real)
    metrics.update(real)
    results = metrics.compute()
    logits = metrics.feature_network(real).logits.double()
    p = logits.softmax(dim=1)
    score = (p * (p / p.mean(dim=0)).log()).sum(dim=1).mean().exp().item()
    assert results == pytest.approx({"fid": 0, "inception_score": score}, abs=1e-3)
