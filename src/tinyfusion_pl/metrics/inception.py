"""InceptionV3 of 2015, the feature network of published FID and Inception scores.

Architecture, weights and TensorFlow 1 resizing come from torch-fidelity, which reproduces the
reference implementation.
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
    """InceptionV3 for color images of any size, uint8 (N, 3, H, W).

    It returns features (N, 2048), logits (N, 1008) without bias, and spatial features (N, 2023) for
    sFID: the first 7 channels of the first 1x1 branch of ``Mixed_6d`` after batch norm and ReLU.
    The logits are not in the class order of ImageNet, so `GenerationMetrics` computes no accuracy
    with this network.

    Args:
        weights_path: Weights file of torch-fidelity. Default: the copy in torch's download folder,
            downloaded if missing. ``"random"``: random weights, to try out a recipe; the results
            are meaningless.

    Raises:
        ArtifactError: if the weights cannot be downloaded, or the file holds something else.
    """

    num_features, num_classes, num_spatial = 2048, 1008, 7 * 17 * 17
    logits_are_classes = False

    def __init__(self, weights_path: str | os.PathLike | None = None) -> None:
        super().__init__()
        _check_installed()
        if str(weights_path) == RANDOM:
            warnings.warn(
                "InceptionV3 is randomly initialized: metrics computed with it are meaningless.",
                stacklevel=2,
            )
            self.network, self.name = _random(), "RandomInceptionFeatures"
            return
        path = _download() if weights_path is None else Path(weights_path)
        _check_is_data(path)  # torch-fidelity would run code in a pickle
        try:
            self.network = _network(path)
        except (RuntimeError, TypeError) as error:
            raise _not_weights(path, error) from error

    def forward(self, images: Tensor) -> Features:
        """Return the `Features` of images, uint8 (N, 3, H, W)."""
        check_images(images, num_channels=3)
        maps: list[Tensor] = []
        handle = self.network.get_submodule("Mixed_6d.branch1x1").register_forward_hook(
            lambda _, __, output: maps.append(output)
        )
        try:
            features, logits = self.network(images)
        finally:
            handle.remove()
        return Features(features, logits, spatial_features(maps[0]))  # 2048, 1008, 2023 wide


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
            # An empty file keeps the random initialization.
            return super().load_state_dict(state, *args) if state else None

    return Network(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
    )


def _random() -> nn.Module:
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same network each time, so that an evaluation can resume
        torch.save({}, path := Path(folder) / "empty.pth")
        return _network(path)


def _download() -> Path:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as URL

    try:
        # The same place as torch-fidelity's own download.
        return fetch(URL, cache_folder() / URL.rsplit("/", 1)[1])
    except ArtifactError as error:
        raise ArtifactError(
            f"InceptionV3 weights: {error} Or give the path of the file as weights_path."
        ) from error


def _check_is_data(path: Path) -> None:
    if not path.is_file():
        raise ArtifactError(
            f"File {path} with the InceptionV3 weights not found. Check weights_path."
        )
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types
        raise _not_weights(path, error) from error


def _not_weights(path: Path, error: Exception) -> ArtifactError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ArtifactError(
        f"{path} does not hold the InceptionV3 weights of torch-fidelity ({reason}). It may be "
        "truncated or belong to another network: remove it and download it again."
    )
