"""CIFAR-10's ResNet-56, whose published weights make Fréchet distances of 32 x 32 images possible without Inception."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyfusion_pl.artifacts import ArtifactError
from tinyfusion_pl.metrics.features import Features, spatial_features
from tinyfusion_pl.metrics.networks import ModuleFeatures

NUM_FEATURES, NUM_CLASSES, NUM_SPATIAL = 64, 10, 7 * 8 * 8


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut without parameters (He et al. 1512.03385, section 4.2, option A)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.stride = 1 if in_channels == out_channels else 2
        self.conv1 = nn.Conv2d(
            in_channels, out_channels, 3, stride=self.stride, padding=1, bias=False
        )
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(out_channels), nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        missing = y.shape[1] - x.shape[1]
        shortcut = F.pad(
            x[:, :, :: self.stride, :: self.stride],
            (0, 0, 0, 0, missing // 2, missing - missing // 2),
        )
        return F.relu(y + shortcut)


class ResNet(nn.Module):
    """CIFAR-10's ResNet of 6 n + 2 layers: normalised images (N, 3, 32, 32) to `Features`; sFID's are of the last maps."""

    def __init__(self, n: int = 9) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        for name, in_channels, out_channels in (
            ("layer1", 16, 16),
            ("layer2", 16, 32),
            ("layer3", 32, 64),
        ):
            blocks = [
                Block(in_channels if i == 0 else out_channels, out_channels) for i in range(n)
            ]
            setattr(self, name, nn.Sequential(*blocks))
        self.linear = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def forward(self, x: Tensor) -> Features:
        x = F.relu(self.bn1(self.conv1(x.contiguous(memory_format=torch.channels_last))))
        maps = self.layer3(self.layer2(self.layer1(x)))  # (N, 64, 8, 8)
        features = maps.mean((2, 3))  # (N, 64)
        return Features(
            features, self.linear(features), spatial_features(maps)
        )  # (N, 64), (N, 10), (N, 448)


def load_cifar_resnet(path: str | Path) -> ModuleFeatures:
    """ResNet-56 as a feature network of 32 x 32 images: 64 features, 10 classes, 448 spatial features.

    Args:
        path: ``resnet56-4bfd9763.th`` of akamaster's pytorch_resnet_cifar10, as published.

    Raises:
        ArtifactError: for a file that is missing, or holds something else.
    """
    if not Path(path).is_file():
        raise ArtifactError(
            f"There is no file {path}. Download resnet56-4bfd9763.th of akamaster/pytorch_resnet_cifar10, and put it there."
        )
    resnet = ResNet()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        resnet.load_state_dict(
            {name.removeprefix("module."): x for name, x in state.items()}
        )  # saved from within DataParallel
    except Exception as error:  # torch raises whatever it runs into
        raise ArtifactError(
            f"{path} does not hold the weights of a CIFAR-10 ResNet-56 ({str(error).splitlines()[0]}). Download it again."
        ) from error
    resnet = resnet.to(memory_format=torch.channels_last).eval().requires_grad_(False)
    return ModuleFeatures(
        resnet,
        num_features=NUM_FEATURES,
        num_classes=NUM_CLASSES,
        num_spatial=NUM_SPATIAL,
        name="resnet56_cifar10",
    )
