"""Compare CIFAR-10's test images with its training images in the features of a small ResNet.

FOLDER contains ``cifar10_train_jpegbytes.npz`` and ``cifar10_test_jpegbytes.npz`` (``blob``,
``offsets``, ``labels``: concatenated JPEG files) and ``resnet56-4bfd9763.th``, akamaster's CIFAR-10
ResNet-56. `load_cifar_resnet` shows how to wrap another network as a feature network:

    python examples/measure_cifar10.py FOLDER [--num-reference 50000] [--num-samples 10000]
        [--threads 2]
"""

from __future__ import annotations

import argparse
import io
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tinyfusion_pl.metrics import GenerationMetrics, load_cifar_resnet


def read_images(path: Path, num: int) -> tuple[Tensor, Tensor]:
    """The first `num` images, uint8 (N, 3, 32, 32), and their labels (N,)."""
    with np.load(path, allow_pickle=False) as file:
        blob, offsets, labels = file["blob"], file["offsets"], file["labels"]
    num = min(num, len(labels))
    decoded = (
        Image.open(io.BytesIO(blob[offsets[i] : offsets[i + 1]].tobytes())).convert("RGB")
        for i in range(num)
    )
    images = torch.stack([torch.from_numpy(np.array(image)) for image in decoded])  # (N, H, W, 3)
    return images.permute(0, 3, 1, 2), torch.from_numpy(labels[:num].astype(np.int64))


def main(
    folder: Path, *, num_reference: int = 50_000, num_samples: int = 10_000, batch_size: int = 500
) -> dict[str, float]:
    """Measure; returns each metric's number."""
    metrics = GenerationMetrics(load_cifar_resnet(folder / "resnet56-4bfd9763.th"))
    for part in read_images(folder / "cifar10_train_jpegbytes.npz", num_reference)[0].split(
        batch_size
    ):
        metrics.update_reference(part)
    images, labels = read_images(folder / "cifar10_test_jpegbytes.npz", num_samples)
    for part, y in zip(images.split(batch_size), labels.split(batch_size)):
        metrics.update(part, y)
    results = metrics.compute()
    print(
        json.dumps(
            {"feature_network": metrics.fingerprint(), "metrics": metrics.settings(), **results},
            indent=2,
        )
    )
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num-reference", type=int, default=50_000)
    parser.add_argument("--num-samples", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    main(args.folder, num_reference=args.num_reference, num_samples=args.num_samples)
    print(f"{time.perf_counter() - start:.0f} s")
