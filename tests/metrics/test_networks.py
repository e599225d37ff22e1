"""Feature networks of one's choice: any module, timm models by name."""

import pytest
import timm
import torch
from torch import nn

from tinyfusion_pl.artifacts import ArtifactError
from tinyfusion_pl.metrics import Features, FrechetDistance, GaussianMMD, GenerationMetrics, ModuleFeatures, TimmFeatures

PICTURES = torch.randint(0, 256, (5, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_any_module_sees_resized_and_normalised_pictures():
    seen = []

    class Net(nn.Module):
        def forward(self, x):
            seen.append(x)
            return x.mean((2, 3)), x.amax((2, 3))

    network = ModuleFeatures(Net(), num_features=3, num_classes=3, image_size=8, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    features = network(PICTURES)
    assert isinstance(features, Features) and features.spatial is None and features.logits.shape == (5, 3)
    assert seen[0].shape == (5, 3, 8, 8)
    plain = ModuleFeatures(Net(), num_features=3, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    torch.testing.assert_close(plain(PICTURES).features, ((PICTURES.float() / 255 - 0.5) / 0.25).mean((2, 3)))
    with pytest.raises(ValueError, match="sees colour pictures"):
        network(PICTURES[:, :1])


def test_a_timm_model_gives_its_features_and_logits_and_loads_a_file(tmp_path):
    torch.manual_seed(1)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=7).eval()
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    network = TimmFeatures("vit_tiny_patch16_224", checkpoint_path=tmp_path / "vit.pth", image_size=32, num_classes=7)
    features = network(PICTURES)
    assert features.features.shape == (5, network.num_features) and features.logits.shape == (5, network.num_classes)
    torch.testing.assert_close(model.get_classifier()(features.features), features.logits)


def test_fd_and_cmmd_run_over_a_timm_model_behind_the_same_interface():
    network = TimmFeatures("vit_tiny_patch16_224", pretrained=False, image_size=32, num_classes=7, global_pool="token")
    metrics = GenerationMetrics(network, metrics={"fd": FrechetDistance(network.num_features), "cmmd": GaussianMMD(7, of="logits")})
    metrics.update_reference(PICTURES)
    metrics.update(PICTURES)
    assert metrics.compute() == pytest.approx({"fd": 0, "cmmd": 0}, abs=1e-3)
    assert metrics.fingerprint().startswith("vit_tiny_patch16_224-")


def test_unknown_names_and_weights_that_cannot_be_had_are_told(tmp_path):
    with pytest.raises(ValueError, match="timm knows no model 'vit_nothing'"):
        TimmFeatures("vit_nothing")
    with pytest.raises(ArtifactError, match="weights of vit_tiny_patch16_224 cannot be had from .*missing.pth.*checkpoint_path"):
        TimmFeatures("vit_tiny_patch16_224", checkpoint_path=tmp_path / "missing.pth")
