"""The digits of scikit-learn: 1797 handwritten digits, 8x8 pixels of 17 gray levels.

Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits (test part), UCI Machine
Learning Repository, 1998; shipped with scikit-learn.
"""

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from tinyfusion_pl.checksums import state_sha256
from tinyfusion_pl.data.base import GenerationDataModule
from tinyfusion_pl.data.pixels import decode_pixels


class DigitsDataModule(GenerationDataModule):
    """All 1797 digits as latents: x (N, 1, 8, 8) in [-1, 1], white on black, y in 0..9.

    Example:
        >>> from tinyfusion_pl.data import DigitsDataModule
        >>> x, y = next(iter(DigitsDataModule(batch_size=4).train_dataloader()))
        >>> tuple(x.shape), tuple(y.shape)
        ((4, 1, 8, 8), (4,))
    """

    latent_shape = (1, 8, 8)
    num_classes = 10

    def __init__(self, batch_size: int = 128, *, seed: int = 0, num_workers: int = 0) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)

    def train_set(self) -> Dataset:
        """Return all digits."""
        return TensorDataset(*_digits())

    def samples_sha256(self) -> str:
        """Return a checksum of all digits."""
        return state_sha256(dict(zip("xy", _digits())))

    def decode(self, latents: Tensor) -> Tensor:
        """Scale [-1, 1] to 0..255, clamped; rounded to uint8, not to the 17 levels of the data."""
        return decode_pixels(latents, self.latent_shape, name="Digit")  # (N, 1, 8, 8)

    def reference_images(self) -> tuple[Tensor, Tensor]:
        """Return all digits as images (1797, 1, 8, 8), through `decode`, and their labels."""
        x, y = _digits()
        return self.decode(x), y


def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits  # slow to import

    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images).float().view(-1, 1, 8, 8) / 8 - 1  # (1797, 1, 8, 8)
    return x, torch.from_numpy(labels).long()
