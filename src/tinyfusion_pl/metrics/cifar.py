"""ResNet-56 for CIFAR-10: a feature network of 32 x 32 images with published weights."""

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
    """Two 3x3 convolutions and a shortcut without parameters.

    He et al. 1512.03385, section 4.2, option A.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.stride = 1 if in_channels == out_channels else 2
        self.conv1 = nn.Conv2d(
            in_channels, out_channels, 3, stride=self.stride, padding=1, bias=False
        )
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(out_channels), nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, out_channels, H / stride, W / stride) of x (N, in_channels, H, W)."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        missing = y.shape[1] - x.shape[1]
        padding = (0, 0, 0, 0, missing // 2, missing - missing // 2)
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], padding)
        return F.relu(y + shortcut)


class ResNet(nn.Module):
    """ResNet of 6 n + 2 layers for CIFAR-10: normalized images (N, 3, 32, 32) to `Features`.

    The spatial features are those of the last maps.
    """

    def __init__(self, n: int = 9) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = _make_layer(16, 16, n)
        self.layer2 = _make_layer(16, 32, n)
        self.layer3 = _make_layer(32, 64, n)
        self.linear = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def forward(self, x: Tensor) -> Features:
        """Return the `Features` of normalized images (N, 3, 32, 32)."""
        x = F.relu(self.bn1(self.conv1(x.contiguous(memory_format=torch.channels_last))))
        maps = self.layer3(self.layer2(self.layer1(x)))  # (N, 64, 8, 8)
        features = maps.mean((2, 3))  # (N, 64)
        logits, spatial = self.linear(features), spatial_features(maps)  # (N, 10), (N, 448)
        return Features(features, logits, spatial)


def _make_layer(in_channels: int, out_channels: int, n: int) -> nn.Sequential:
    return nn.Sequential(
        *(Block(in_channels if i == 0 else out_channels, out_channels) for i in range(n))
    )


def load_cifar_resnet(path: str | Path) -> ModuleFeatures:
    """Load ResNet-56 as a feature network of 32 x 32 images.

    It returns 64 features, logits of 10 classes and 448 spatial features.

    Args:
        path: ``resnet56-4bfd9763.th`` of akamaster/pytorch_resnet_cifar10, as published.

    Raises:
        ArtifactError: if the file is missing or holds something else.
    """
    if not Path(path).is_file():
        raise ArtifactError(
            f"File {path} not found. Download resnet56-4bfd9763.th of "
            "akamaster/pytorch_resnet_cifar10 to that path."
        )
    resnet = ResNet()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        # The published file was saved from within DataParallel.
        resnet.load_state_dict({name.removeprefix("module."): x for name, x in state.items()})
    except Exception as error:  # torch raises many types
        raise ArtifactError(
            f"{path} does not hold the weights of a CIFAR-10 ResNet-56 "
            f"({str(error).splitlines()[0]}). Download it again."
        ) from error
    resnet = resnet.to(memory_format=torch.channels_last).eval().requires_grad_(False)
    return ModuleFeatures(
        resnet,
        num_features=NUM_FEATURES,
        num_classes=NUM_CLASSES,
        num_spatial=NUM_SPATIAL,
        name="resnet56_cifar10",
    )
