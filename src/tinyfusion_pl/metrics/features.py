"""The interface of feature networks: uint8 images in, features and logits out."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Features(NamedTuple):
    """Outputs of a feature network for N images.

    Args:
        features: (N, num_features).
        logits: (N, num_classes), without bias for the published Inception score; or None.
        spatial: (N, num_spatial), features before pooling, for sFID; or None.
    """

    features: Tensor
    logits: Tensor | None = None
    spatial: Tensor | None = None


class FeatureNetwork(Protocol):
    """Any callable from uint8 images (N, C, H, W) to `Features`; a module is moved and frozen.

    Optional attributes:

    - ``num_classes``: Width of the logits.
    - ``num_spatial``: Width of the spatial features.
    - ``logits_are_classes``: False if the logits are never the classes of the data, so that there
      is no accuracy.
    - ``name`` and ``preprocessing``: Part of the fingerprint, which references and results carry;
      `preprocessing` is what determines the features besides the weights.
    """

    num_features: int

    def __call__(self, images: Tensor) -> Features:
        """Return the `Features` of uint8 images (N, C, H, W)."""
        ...


def check_images(
    images: Tensor, *, num_channels: int | None = None, size: tuple[int, int] | None = None
) -> None:
    """Raise `ValueError` unless `images` is uint8 (N, C, H, W), with this C and (H, W) if given."""
    if images.dtype != torch.uint8:
        raise ValueError(
            "Expected images as uint8 tensors with values in 0..255, got "
            f"{images.dtype}{describe_values(images)}. Convert latents or floats with decode() of "
            "the data module."
        )
    shape = tuple(images.shape)
    if len(shape) != 4:
        raise ValueError(f"Expected images of shape (N, C, H, W), got {shape}.")
    if num_channels is not None and shape[1] != num_channels:
        kinds = {1: "grayscale", 3: "color"}
        raise ValueError(
            f"This feature network expects {kinds[num_channels]} images (N, {num_channels}, H, W), "
            f"got {kinds.get(shape[1], 'other')} images {shape}. Choose the feature network that "
            "matches the data."
        )
    if size is not None and shape[2:] != size:
        raise ValueError(
            f"This feature network expects images of {size[0]}x{size[1]}, got "
            f"{shape[2]}x{shape[3]}."
        )


def spatial_features(maps: Tensor, num_channels: int = 7) -> Tensor:
    """Flatten the first channels of maps (N, C, H, W), channels last: (N, H * W * num_channels)."""
    return maps[:, :num_channels].permute(0, 2, 3, 1).flatten(1)


def describe_values(images: Tensor) -> str:
    """Return what is unusual about images (N, ...) that are not uint8: NaNs, or the range."""
    if not images.is_floating_point() or not images.numel():
        return ""
    bad = ~torch.isfinite(images)
    bad = bad.flatten(1).any(1) if images.ndim > 1 else bad
    if bad.any():
        return (
            f", {int(bad.sum())} of {len(images)} with values that are not finite (positions "
            f"{bad.nonzero().flatten().tolist()[:8]})"
        )
    return f" between {images.min():.3g} and {images.max():.3g}"
