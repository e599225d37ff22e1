"""CIFAR-10's test pictures held against its training pictures in the features of a small ResNet: what real pictures score.

FOLDER holds ``cifar10_train_jpegbytes.npz`` and ``cifar10_test_jpegbytes.npz`` (``blob``, ``offsets``, ``labels``: JPEG files end to end)
and ``resnet56-4bfd9763.th``, akamaster's CIFAR-10 ResNet-56. It shows how a network of one's own becomes a feature network:

    python examples/measure_cifar10.py FOLDER [--num-reference 50000] [--num-samples 10000] [--threads 2]
"""

from __future__ import annotations

import argparse
import io
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from tinyfusion_pl.metrics import Features, GenerationMetrics, ModuleFeatures
from tinyfusion_pl.metrics.features import spatial_features

NUM_FEATURES, NUM_CLASSES, NUM_SPATIAL = 64, 10, 7 * 8 * 8


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut without parameters (He et al. 1512.03385, section 4.2, option A)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.stride = 1 if in_channels == out_channels else 2
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=self.stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(out_channels), nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        missing = y.shape[1] - x.shape[1]
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, missing // 2, missing - missing // 2))
        return F.relu(y + shortcut)


class ResNet(nn.Module):
    """CIFAR-10's ResNet of 6 n + 2 layers: normalised pictures (N, 3, 32, 32) to `Features`; sFID's are of the last maps."""

    def __init__(self, n: int = 9) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        for name, in_channels, out_channels in (("layer1", 16, 16), ("layer2", 16, 32), ("layer3", 32, 64)):
            blocks = [Block(in_channels if i == 0 else out_channels, out_channels) for i in range(n)]
            setattr(self, name, nn.Sequential(*blocks))
        self.linear = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def forward(self, x: Tensor) -> Features:
        x = F.relu(self.bn1(self.conv1(x.contiguous(memory_format=torch.channels_last))))
        maps = self.layer3(self.layer2(self.layer1(x)))  # (N, 64, 8, 8)
        features = maps.mean((2, 3))  # (N, 64)
        return Features(features, self.linear(features), spatial_features(maps))  # (N, 64), (N, 10), (N, 448)


def load_resnet56(path: Path) -> ModuleFeatures:
    """The published weights, saved from within DataParallel, as a feature network of 32x32 pictures."""
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    resnet = ResNet()
    resnet.load_state_dict({name.removeprefix("module."): x for name, x in state.items()})
    return ModuleFeatures(resnet.to(memory_format=torch.channels_last), num_features=NUM_FEATURES, num_classes=NUM_CLASSES,
                          num_spatial=NUM_SPATIAL, name="resnet56_cifar10")


def read_pictures(path: Path, num: int) -> tuple[Tensor, Tensor]:
    """The first `num` pictures, uint8 (N, 3, 32, 32), and their labels (N,)."""
    with np.load(path, allow_pickle=False) as file:
        blob, offsets, labels = file["blob"], file["offsets"], file["labels"]
    num = min(num, len(labels))
    decoded = (Image.open(io.BytesIO(blob[offsets[i] : offsets[i + 1]].tobytes())).convert("RGB") for i in range(num))
    pictures = torch.stack([torch.from_numpy(np.array(picture)) for picture in decoded])  # (N, H, W, 3)
    return pictures.permute(0, 3, 1, 2), torch.from_numpy(labels[:num].astype(np.int64))


def main(folder: Path, *, num_reference: int = 50_000, num_samples: int = 10_000, batch_size: int = 500) -> dict[str, float]:
    """Measure; returns each metric's number."""
    metrics = GenerationMetrics(load_resnet56(folder / "resnet56-4bfd9763.th"))
    for part in read_pictures(folder / "cifar10_train_jpegbytes.npz", num_reference)[0].split(batch_size):
        metrics.update_reference(part)
    pictures, labels = read_pictures(folder / "cifar10_test_jpegbytes.npz", num_samples)
    for part, y in zip(pictures.split(batch_size), labels.split(batch_size)):
        metrics.update(part, y)
    results = metrics.compute()
    print(json.dumps({"feature_network": metrics.fingerprint(), "metrics": metrics.settings(), **results}, indent=2))
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num-reference", type=int, default=50_000)
    parser.add_argument("--num-samples", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    main(args.folder, num_reference=args.num_reference, num_samples=args.num_samples)
    print(f"{time.perf_counter() - start:.0f} s")
