"""What a feature network is to the metrics: uint8 images in; features (for FID) and logits (IS, accuracy) out."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Features(NamedTuple):
    """What a feature network says of N images: `features` (N, num_features), and where it has them `logits` (N, num_classes), bias-free
    for the published Inception score, and `spatial` (N, num_spatial), features before pooling, for sFID.
    """

    features: Tensor
    logits: Tensor | None = None
    spatial: Tensor | None = None


class FeatureNetwork(Protocol):
    """Any callable from uint8 images (N, C, H, W) to `Features`; one that is a module is moved and frozen as such.

    Beside `num_features` it may state `num_classes` (width of its logits), `num_spatial`, `logits_are_classes` (False: never of the data,
    so that labels say nothing of them), `name` and `preprocessing` (what else than weights decides its features): the last two are in
    its fingerprint, which references and results carry.
    """

    num_features: int

    def __call__(self, images: Tensor) -> Features: ...


def check_images(
    images: Tensor, *, num_channels: int | None = None, size: tuple[int, int] | None = None
) -> None:
    """`ValueError` unless `images` is uint8 (N, C, H, W) with that number of channels and that size, if given."""
    if images.dtype != torch.uint8:
        raise ValueError(
            f"Images are uint8 tensors with values 0..255; these are {images.dtype}{describe_values(images)}. "
            "Latents or floats become images by the data module's decode()."
        )
    shape = tuple(images.shape)
    if len(shape) != 4:
        raise ValueError(f"Images are (N, C, H, W); these are {shape}.")
    if num_channels is not None and shape[1] != num_channels:
        kinds = {1: "grey", 3: "colour"}
        raise ValueError(
            f"This feature network sees {kinds[num_channels]} images (N, {num_channels}, H, W); these are "
            f"{kinds.get(shape[1], 'other')} ones, {shape}. Choose the feature network that belongs to the data."
        )
    if size is not None and shape[2:] != size:
        raise ValueError(
            f"This feature network sees images of {size[0]}x{size[1]}; these are {shape[2]}x{shape[3]}."
        )


def spatial_features(maps: Tensor, num_channels: int = 7) -> Tensor:
    """The first channels of feature maps (N, C, H, W), flattened in height, width, channel order: (N, H * W * num_channels)."""
    return maps[:, :num_channels].permute(0, 2, 3, 1).flatten(1)


def describe_values(images: Tensor) -> str:
    """What is in images (N, ...) that are not uint8, for the person who looks for the mistake: not-a-numbers counted, or the range."""
    if not images.is_floating_point() or not images.numel():
        return ""
    bad = (
        (~torch.isfinite(images)).flatten(1).any(1) if images.ndim > 1 else ~torch.isfinite(images)
    )
    if bad.any():
        return f", and {int(bad.sum())} of {len(images)} hold values that are not finite (places {bad.nonzero().flatten().tolist()[:8]})"
    return f" between {images.min():.3g} and {images.max():.3g}"
