"""What a feature network is to the metrics: uint8 pictures in; features (for FID) and logits (IS, accuracy) out."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Features(NamedTuple):
    """What a feature network says of N pictures: `features` (N, num_features), `logits` (N, classes)."""

    features: Tensor
    logits: Tensor


class FeatureNetwork(Protocol):
    """Any callable from uint8 pictures (N, C, H, W) to `Features`; one that is a module is moved and frozen as such."""

    num_features: int

    def __call__(self, pictures: Tensor) -> Features: ...


def check_pictures(pictures: Tensor, *, num_channels: int | None = None, size: tuple[int, int] | None = None) -> None:
    """`ValueError` unless `pictures` is uint8 (N, C, H, W) with that number of channels and that size, if given."""
    if pictures.dtype != torch.uint8:
        raise ValueError(
            f"Pictures are uint8 tensors with values 0..255; these are {pictures.dtype}. "
            "Latents or floats become pictures by the data module's decode()."
        )
    shape = tuple(pictures.shape)
    if len(shape) != 4:
        raise ValueError(f"Pictures are (N, C, H, W); these are {shape}.")
    if num_channels is not None and shape[1] != num_channels:
        kinds = {1: "grey", 3: "colour"}
        raise ValueError(
            f"This feature network sees {kinds[num_channels]} pictures (N, {num_channels}, H, W); these are "
            f"{kinds.get(shape[1], 'other')} ones, {shape}. Choose the feature network that belongs to the data."
        )
    if size is not None and shape[2:] != size:
        raise ValueError(f"This feature network sees pictures of {size[0]}x{size[1]}; these are {shape[2]}x{shape[3]}.")
