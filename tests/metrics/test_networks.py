"""Feature networks of one's choice: any module, timm models by name."""

import pytest
import timm
import torch
from torch import nn

from tinyfusion_pl.artifacts import ArtifactError
from tinyfusion_pl.metrics import (
    Features,
    FrechetDistance,
    GaussianMMD,
    GenerationMetrics,
    ModuleFeatures,
    Reference,
    TimmFeatures,
    read_reference,
)

IMAGES = torch.randint(
    0, 256, (5, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


def test_any_module_sees_resized_and_normalised_images():
    seen = []

    class Net(nn.Module):
        def forward(self, x):
            seen.append(x)
            return x.mean((2, 3)), x.amax((2, 3))

    network = ModuleFeatures(
        Net(),
        num_features=3,
        num_classes=3,
        image_size=8,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )
    features = network(IMAGES)
    assert (
        isinstance(features, Features)
        and features.spatial is None
        and features.logits.shape == (5, 3)
    )
    assert seen[0].shape == (5, 3, 8, 8)
    plain = ModuleFeatures(Net(), num_features=3, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    torch.testing.assert_close(
        plain(IMAGES).features, ((IMAGES.float() / 255 - 0.5) / 0.25).mean((2, 3))
    )
    with pytest.raises(ValueError, match="expects color images"):
        network(IMAGES[:, :1])


def test_a_timm_model_gives_its_features_and_logits_and_loads_a_file(tmp_path):
    torch.manual_seed(1)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=7).eval()
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    network = TimmFeatures(
        "vit_tiny_patch16_224", checkpoint_path=tmp_path / "vit.pth", image_size=32, num_classes=7
    )
    features = network(IMAGES)
    assert features.features.shape == (5, network.num_features) and features.logits.shape == (
        5,
        network.num_classes,
    )
    torch.testing.assert_close(model.get_classifier()(features.features), features.logits)


def test_fd_and_cmmd_run_over_a_timm_model_behind_the_same_interface():
    network = TimmFeatures(
        "vit_tiny_patch16_224", pretrained=False, image_size=32, num_classes=7, global_pool="token"
    )
    metrics = GenerationMetrics(
        network,
        metrics={"fd": FrechetDistance(network.num_features), "cmmd": GaussianMMD(7, of="logits")},
    )
    metrics.update_reference(IMAGES)
    metrics.update(IMAGES)
    assert metrics.compute() == pytest.approx({"fd": 0, "cmmd": 0}, abs=1e-3)
    assert metrics.fingerprint().startswith("vit_tiny_patch16_224-")


def test_a_reference_made_with_another_preprocessing_of_the_same_weights_is_refused(tmp_path):
    def metrics(**changes):
        torch.manual_seed(0)
        network = TimmFeatures(
            "vit_tiny_patch16_224",
            pretrained=False,
            **{"image_size": 32, "num_classes": 0, **changes},
        )
        return GenerationMetrics(network, metrics={"fd": FrechetDistance(network.num_features)})

    made = metrics()
    made.update_reference(IMAGES)
    Reference(
        path=tmp_path / "ref.npz", statistics=made.statistics(), network=made.fingerprint()
    ).write()
    metrics().set_reference(read_reference(tmp_path / "ref.npz"))
    other = metrics(global_pool="avg", fc_norm=False)  # the very same weights
    assert {k: v.tolist() for k, v in other.state_dict().items()} == {
        k: v.tolist() for k, v in made.state_dict().items() if "fd" not in k
    }
    other_size = metrics()
    other_size.feature_network.preprocessing["interpolation"] = "bilinear"
    for each in (other, other_size):
        with pytest.raises(ValueError, match="made with the feature network vit_tiny_patch16_224-"):
            each.set_reference(read_reference(tmp_path / "ref.npz"))


def test_unknown_names_and_weights_that_cannot_be_had_are_told(tmp_path):
    with pytest.raises(ValueError, match="timm has no model 'vit_nothing'"):
        TimmFeatures("vit_nothing")
    with pytest.raises(
        ArtifactError,
        match="weights of vit_tiny_patch16_224 could not be loaded from .*missing.pth.*checkpoint_path",
    ):
        TimmFeatures("vit_tiny_patch16_224", checkpoint_path=tmp_path / "missing.pth")
