"""The feature network for images: the InceptionV3 of 2015 that published FID and IS are measured with.

Architecture, weights and TensorFlow-1 resizing are torch-fidelity's, which reproduces the reference implementation.
"""

import os
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion_pl.artifacts import ArtifactError
from tinyfusion_pl.metrics.features import Features, check_images, spatial_features
from tinyfusion_pl.models.download import cache_folder, fetch

RANDOM = "random"


class InceptionFeatures(nn.Module):
    """Colour images of any size, uint8 (N, 3, H, W), to features (N, 2048), bias-free logits (N, 1008), spatial features (N, 2023).

    The spatial ones, for sFID, are the first 7 channels of the first 1x1 branch of ``Mixed_6d`` after batch norm and ReLU. The
    logits are ImageNet's classes in an order of their own, so `GenerationMetrics` measures no accuracy with this network.

    Args:
        weights_path: torch-fidelity's weights file. None: its copy in torch's download folder, fetched when missing. ``"random"``: none,
            to try a recipe with; the numbers mean nothing.

    Raises:
        ArtifactError: The weights are not there and cannot be fetched, or the file is something else.
    """

    num_features, num_classes, num_spatial = 2048, 1008, 7 * 17 * 17
    logits_are_classes = False

    def __init__(self, weights_path: str | os.PathLike | None = None) -> None:
        super().__init__()
        _check_installed()
        if str(weights_path) == RANDOM:
            warnings.warn(
                "InceptionV3 is randomly initialised: every number that is measured with it means nothing.",
                stacklevel=2,
            )
            self.network, self.name = _random(), "RandomInceptionFeatures"
            return
        path = _downloaded() if weights_path is None else Path(weights_path)
        _check_is_data(path)  # torch-fidelity would run code that a pickle holds
        try:
            self.network = _network(path)
        except (RuntimeError, TypeError) as error:
            raise _not_weights(path, error) from error

    def forward(self, images: Tensor) -> Features:
        check_images(images, num_channels=3)
        maps: list[Tensor] = []
        handle = self.network.Mixed_6d.branch1x1.register_forward_hook(
            lambda _, __, output: maps.append(output)
        )
        try:
            features, logits = self.network(images)
        finally:
            handle.remove()
        return Features(
            features, logits, spatial_features(maps[0])
        )  # (N, 2048), (N, 1008), (N, 2023)


def _check_installed() -> None:
    if find_spec("torch_fidelity") is None:
        raise ValueError(
            "InceptionFeatures needs torch-fidelity, which is not installed. Install it with the "
            "extra: pip install 'tinyfusion_pl[eval]'."
        )


def _network(path: Path) -> nn.Module:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Network(FeatureExtractorInceptionV3):
        def load_state_dict(self, state: dict[str, Tensor], *args: Any) -> Any:
            return (
                super().load_state_dict(state, *args) if state else None
            )  # an empty file leaves it at random values

    return Network(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
    )


def _random() -> nn.Module:
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same one each time: an evaluation that goes on goes on with it
        torch.save({}, path := Path(folder) / "empty.pth")
        return _network(path)


def _downloaded() -> Path:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as URL

    try:
        return fetch(
            URL, cache_folder() / URL.rsplit("/", 1)[1]
        )  # where torch-fidelity itself keeps it
    except ArtifactError as error:
        raise ArtifactError(
            f"InceptionV3's weights: {error} Or give its place as weights_path."
        ) from error


def _check_is_data(path: Path) -> None:
    if not path.is_file():
        raise ArtifactError(
            f"There is no file {path}, where InceptionV3's weights were expected. Check weights_path."
        )
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken or foreign file makes torch.load raise
        raise _not_weights(path, error) from error


def _not_weights(path: Path, error: Exception) -> ArtifactError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ArtifactError(
        f"{path} does not hold torch-fidelity's InceptionV3 weights ({reason}). It may be truncated, or another "
        "network's: remove it and download it again."
    )
