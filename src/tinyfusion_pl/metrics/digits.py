"""The feature network for digits: a small convolutional classifier, shipped with the package.

`tinyfusion_pl.metrics.classifier` trains it.
"""

from importlib.resources import as_file, files

from torch import Tensor, nn

from tinyfusion_pl.artifacts import load_tensors
from tinyfusion_pl.metrics.features import Features, check_images, spatial_features

# Holds model.safetensors and record.json.
ASSETS = files("tinyfusion_pl") / "assets" / "digits_classifier"


class DigitsClassifier(nn.Module):
    """Classifier of grayscale 8x8 images, uint8 (N, 1, 8, 8).

    It returns features (N, 64), logits (N, 10) of the digits 0..9, and spatial features (N, 112):
    the first 7 channels of its last convolution, flattened channels last, as sFID does for
    Inception.
    """

    num_features, num_classes, num_spatial = 64, 10, 112

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv(1, 32), _conv(32, 32), nn.MaxPool2d(2), _conv(32, 64), nn.MaxPool2d(2)
        )
        self.neck = nn.Sequential(nn.Flatten(), nn.Linear(256, self.num_features), nn.ReLU())
        self.head = nn.Linear(self.num_features, self.num_classes)

    def forward(self, images: Tensor) -> Features:
        """Return the `Features` of images, uint8 (N, 1, 8, 8)."""
        check_images(images, num_channels=1, size=(8, 8))
        x = images.to(self.head.weight.dtype) / 127.5 - 1  # (N, 1, 8, 8)
        maps = self.body[:4](x)  # (N, 64, 4, 4)
        features = self.neck(self.body[4:](maps))  # (N, 64)
        logits, spatial = self.head(features), spatial_features(maps)  # (N, 10), (N, 112)
        return Features(features, logits, spatial)


def load_digits_classifier() -> DigitsClassifier:
    """Load the shipped classifier, frozen and in evaluation mode."""
    classifier = DigitsClassifier()
    with as_file(ASSETS / "model.safetensors") as path:
        classifier.load_state_dict(load_tensors(path))
    return classifier.eval().requires_grad_(False)


def _conv(in_channels: int, out_channels: int) -> nn.Module:
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())
