"""Labeled images without a VAE: the pixels are the latents."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tinyfusion_pl.checksums import state_sha256
from tinyfusion_pl.data.base import GenerationDataModule
from tinyfusion_pl.data.real_images import RealImages
from tinyfusion_pl.data.shards import get_generator

MAX_BYTES = 4 * 2**30  # of all images, which are in memory


def decode_pixels(
    latents: Tensor, latent_shape: tuple[int, int, int], *, name: str = "The"
) -> Tensor:
    """Convert pixels in [-1, 1], clamped, to uint8 (N, C, H, W).

    Raises:
        ValueError: for latents of another shape, or values that are not finite; `name` is the
            start of the message.
    """
    if latents.ndim != 4 or tuple(latents.shape[1:]) != tuple(latent_shape):
        expected = ", ".join(map(str, latent_shape))
        raise ValueError(f"{name} latents are (N, {expected}), got {tuple(latents.shape)}.")
    if not torch.isfinite(latents).all():
        raise ValueError(
            "The latents hold values that are not finite: the model that generated them diverged."
        )
    return (latents.float().clamp(-1, 1) + 1).mul(127.5).round().to(torch.uint8)


class PixelSet(Dataset):
    """Images ``x`` (C, H, W) in [-1, 1] and labels; half of the draws are mirrored."""

    def __init__(self, images: Tensor, labels: Tensor, *, mirror: bool, seed: int) -> None:
        self.images, self.labels, self.seed = images, labels, seed
        self.takes_draws = mirror

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
        draw, index = key if isinstance(key, tuple) else (None, key)
        image = self.images[index]
        if draw is not None and get_generator(self.seed, draw).random() < 0.5:
            image = image.flip(-1)
        return image.float() / 127.5 - 1, self.labels[index]


class PixelImages(GenerationDataModule):
    """Labeled images as latents: x (N, 3, image_size, image_size) in [-1, 1], y (N,).

    The images are kept in memory as uint8.

    Args:
        root: Class folders, or an npz file of image files (``blob``, ``offsets``, ``labels``).
        file: Name of such an npz file in the folder `root`; None: `root` itself.
        image_size: Side of the ADM center crop, in pixels.
        num_classes: Number of classes of the model.
        mirror: Mirror half of the draws left to right.
        class_to_idx: How class folders become labels; see `label_classes`.
        batch_size: Samples per batch and process.
        seed: Seed of the order of samples and of mirroring.
        num_workers: Worker processes that load samples.

    Raises:
        ValueError: for images that cannot be read, labels outside 0..num_classes - 1, or more
            images than fit into 4 GiB.
    """

    def __init__(
        self,
        root: str,
        *,
        file: str | None = None,
        image_size: int = 32,
        num_classes: int = 10,
        mirror: bool = True,
        class_to_idx: str | None = None,
        batch_size: int = 128,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        if image_size < 1 or num_classes < 1:
            raise ValueError(
                f"image_size is {image_size} and num_classes {num_classes}; give counts >= 1."
            )
        path = Path(root) if file is None else Path(root) / file
        if not path.exists():
            raise ValueError(
                f"No images found at {path}. Give data.root, class folders or an npz file of image "
                "files."
            )
        self.num_classes, self.mirror = num_classes, mirror
        self.latent_shape = (3, image_size, image_size)
        self._real = RealImages(path, image_size=image_size, class_to_idx=class_to_idx)

    @cached_property
    def _images_and_labels(self) -> tuple[Tensor, Tensor]:
        size = len(self._real.images) * 3 * self.latent_shape[1] ** 2
        if size > MAX_BYTES:
            raise ValueError(
                f"{self._real.path} has {len(self._real.images):,} images, {size / 2**30:.1f} GiB "
                f"in memory; the limit is {MAX_BYTES / 2**30:.0f} GiB. Extract latents "
                "(task=extract_latents) and train on those."
            )
        found = self._real.classes(num_classes=self.num_classes)
        if not 0 <= found[0] <= found[-1] < self.num_classes:
            raise ValueError(
                f"{self._real.path} has labels {found[0]} to {found[-1]}, but data.num_classes is "
                f"{self.num_classes}; expected 0 to {self.num_classes - 1}. Give the number of "
                "classes, or images of these classes."
            )
        return self._real.images_and_labels

    def train_set(self) -> Dataset:
        """Return all images, scaled to [-1, 1]."""
        images, labels = self._images_and_labels
        return PixelSet(images, labels.long(), mirror=self.mirror, seed=self.seed)

    @property
    def classes(self) -> list[int] | None:
        """Labels of the images, ascending; None: all `num_classes`."""
        found = self._real.classes(num_classes=self.num_classes)
        return None if found == list(range(self.num_classes)) else found

    def samples_sha256(self) -> str:
        """Return a checksum of all images and labels."""
        return state_sha256(dict(zip("xy", self._images_and_labels)))

    def decode(self, latents: Tensor) -> Tensor:
        """Scale [-1, 1] to 0..255, (N, 3, image_size, image_size), clamped."""
        return decode_pixels(latents, self.latent_shape)

    def reference_images(self) -> tuple[Tensor, Tensor]:
        """Return all images, uint8 (N, 3, image_size, image_size), and their labels."""
        images, labels = self._images_and_labels
        return images, labels.long()
