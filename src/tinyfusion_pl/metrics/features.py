"""What a feature network is to the metrics: uint8 pictures in; features (for FID) and logits (IS, accuracy) out."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Features(NamedTuple):
    """What a feature network says of N pictures: `features` (N, num_features), and where it has them `logits` (N, num_classes), bias-free
    for the published Inception score, and `spatial` (N, num_spatial), features before pooling, for sFID."""

    features: Tensor
    logits: Tensor | None = None
    spatial: Tensor | None = None


class FeatureNetwork(Protocol):
    """Any callable from uint8 pictures (N, C, H, W) to `Features`; one that is a module is moved and frozen as such.

    Beside `num_features` it may state `num_classes` (width of its logits), `num_spatial`, `logits_are_classes` (False: never of the data,
    so that labels say nothing of them), `name` and `preprocessing` (what else than weights decides its features): the last two are in
    its fingerprint, which references and results carry.
    """

    num_features: int

    def __call__(self, pictures: Tensor) -> Features: ...


def check_pictures(
    pictures: Tensor, *, num_channels: int | None = None, size: tuple[int, int] | None = None
) -> None:
    """`ValueError` unless `pictures` is uint8 (N, C, H, W) with that number of channels and that size, if given."""
    if pictures.dtype != torch.uint8:
        raise ValueError(
            f"Pictures are uint8 tensors with values 0..255; these are {pictures.dtype}{describe_values(pictures)}. "
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
        raise ValueError(
            f"This feature network sees pictures of {size[0]}x{size[1]}; these are {shape[2]}x{shape[3]}."
        )


def spatial_features(maps: Tensor, num_channels: int = 7) -> Tensor:
    """The first channels of feature maps (N, C, H, W), flattened in height, width, channel order: (N, H * W * num_channels)."""
    return maps[:, :num_channels].permute(0, 2, 3, 1).flatten(1)


def describe_values(pictures: Tensor) -> str:
    """What is in pictures (N, ...) that are not uint8, for the person who looks for the mistake: not-a-numbers counted, or the range."""
    if not pictures.is_floating_point() or not pictures.numel():
        return ""
    bad = (
        (~torch.isfinite(pictures)).flatten(1).any(1)
        if pictures.ndim > 1
        else ~torch.isfinite(pictures)
    )
    if bad.any():
        return f", and {int(bad.sum())} of {len(pictures)} hold values that are not finite (places {bad.nonzero().flatten().tolist()[:8]})"
    return f" between {pictures.min():.3g} and {pictures.max():.3g}"
