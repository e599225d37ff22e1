"""Trains the shipped digit classifier on 4/5 of scikit-learn's digits, shifted by up to one pixel.

``python -m tinyfusion_pl.metrics.classifier FOLDER`` trains it (half a minute on two cores) and
writes FOLDER/model.safetensors and FOLDER/record.json; without FOLDER it overwrites the shipped
files.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyfusion_pl.artifacts import save_tensors, sha256, write_json
from tinyfusion_pl.metrics.digits import ASSETS, DigitsClassifier, load_digits_classifier

__all__ = [
    "DigitsClassifier",
    "digits_split",
    "held_out_accuracy",
    "load_digits_classifier",
    "train_digits_classifier",
]

HELD_OUT = 0.2
SPLIT_SEED = 0


def digits_split() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return (images, labels) for training (1437) and held out (360), stratified by label.

    Images are uint8 (N, 1, 8, 8), labels int64 (N,).
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    # The same values as those of DigitsDataModule.
    pixels = torch.from_numpy(images).mul(255 / 16).round().to(torch.uint8).view(-1, 1, 8, 8)
    labels = torch.from_numpy(labels).long()
    train, test = train_test_split(
        range(len(labels)), test_size=HELD_OUT, random_state=SPLIT_SEED, stratify=labels
    )
    return (pixels[train], labels[train]), (pixels[test], labels[test])


def train_digits_classifier(
    *,
    seed: int = 0,
    num_epochs: int = 30,
    batch_size: int = 64,
    lr: float = 3e-3,
    weight_decay: float = 1e-2,
) -> DigitsClassifier:
    """Train a classifier from `seed` with AdamW and a one-cycle schedule.

    The global random generators do not change.
    """
    (pixels, labels), _ = digits_split()
    num_steps = num_epochs * (len(labels) // batch_size)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        classifier = DigitsClassifier().train()
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=lr, weight_decay=weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=num_steps)
        for _ in range(num_epochs):
            for batch in torch.randperm(len(labels)).split(batch_size)[: len(labels) // batch_size]:
                logits = classifier(_shifted(pixels[batch])).logits  # (N, 10)
                optimizer.zero_grad()
                F.cross_entropy(logits, labels[batch]).backward()
                optimizer.step()
                schedule.step()
    return classifier.eval().requires_grad_(False)


def held_out_accuracy(classifier: DigitsClassifier) -> float:
    """Return the accuracy on the 360 held-out digits, 0 to 1."""
    _, (pixels, labels) = digits_split()
    return (classifier(pixels).logits.argmax(1) == labels).double().mean().item()


def write_digits_classifier(folder: Path, *, seed: int = 0) -> dict[str, Any]:
    """Train, write model.safetensors and record.json to `folder`, and return the record."""
    import numpy
    import sklearn

    classifier = train_digits_classifier(seed=seed)
    save_tensors(folder / "model.safetensors", classifier.state_dict())
    record = {
        "model": "tinyfusion_pl.metrics.DigitsClassifier",
        "recipe": "python -m tinyfusion_pl.metrics.classifier",
        "seed": seed,
        "split": {
            "data": "sklearn.datasets.load_digits",
            "held_out": HELD_OUT,
            "stratified": True,
            "seed": SPLIT_SEED,
        },
        "held_out_accuracy": held_out_accuracy(classifier),
        "num_params": sum(parameter.numel() for parameter in classifier.parameters()),
        "sha256": sha256(folder / "model.safetensors"),
        "versions": {
            module.__name__: str(module.__version__) for module in (torch, numpy, sklearn)
        },
    }
    write_json(folder / "record.json", record)
    return record


def _shifted(pixels: Tensor) -> Tensor:
    """Shift each image by -1, 0 or 1 pixel along both axes, filling with black."""
    num, _, height, width = pixels.shape
    padded = F.pad(pixels, (1, 1, 1, 1))  # (N, 1, H + 2, W + 2)
    down, right = torch.randint(0, 3, (2, num, 1, 1))
    rows = torch.arange(height).view(1, -1, 1) + down
    columns = torch.arange(width).view(1, 1, -1) + right
    return padded[torch.arange(num).view(-1, 1, 1), 0, rows, columns].unsqueeze(1)  # (N, 1, H, W)


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else str(ASSETS))
    record = write_digits_classifier(folder)
    print(f"{folder / 'model.safetensors'}: held-out accuracy {record['held_out_accuracy']:.2%}")
