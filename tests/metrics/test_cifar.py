"""The ResNet-56 of CIFAR-10 as a feature network, from a file as it is published."""

import pytest
import torch
import torch.nn.functional as F

from tinyfusion_pl.artifacts import ArtifactError
from tinyfusion_pl.metrics import load_cifar_resnet
from tinyfusion_pl.metrics.cifar import ResNet


def published(path):
    """A file of random weights, named as DataParallel names them."""
    torch.manual_seed(0)
    resnet = ResNet()
    torch.save(
        {"state_dict": {f"module.{name}": x for name, x in resnet.state_dict().items()}}, path
    )
    return resnet.eval()


def test_features_are_those_before_the_linear_layer(tmp_path):
    resnet = published(tmp_path / "resnet.th")
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        found = load_cifar_resnet(tmp_path / "resnet.th")(images)
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        x = (images / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        maps = resnet.layer3(resnet.layer2(resnet.layer1(F.relu(resnet.bn1(resnet.conv1(x))))))
    assert (
        sum(p.numel() for p in resnet.parameters()) == 853_018
    )  # He et al. 1512.03385, table 6: 0.85M
    assert torch.allclose(found.features, maps.mean((2, 3)), atol=1e-4)
    assert torch.allclose(found.logits, resnet.linear(maps.mean((2, 3))), atol=1e-4)
    assert found.spatial.shape == (3, 448)


def test_other_files_are_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.th")
    with pytest.raises(ArtifactError, match="ResNet-56"):
        load_cifar_resnet(tmp_path / "other.th")
    with pytest.raises(ArtifactError, match="File .* not found"):
        load_cifar_resnet(tmp_path / "none.th")
