"""ImageNet latents: shards of task=extract_latents, or the published folders of npy files."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from tinyfusion_pl.checksums import state_sha256
from tinyfusion_pl.data.base import GenerationDataModule
from tinyfusion_pl.data.classes import GIVEN, IMAGENET, disagreement, label_classes, relabel
from tinyfusion_pl.data.drawn_latents import DrawnLatents
from tinyfusion_pl.data.latents_info import FINISHED, UNFINISHED
from tinyfusion_pl.data.numpy_folders import NumpyFolders
from tinyfusion_pl.data.random_latents import RANDOM, random_images, write_random_latents
from tinyfusion_pl.data.real_images import RealImages
from tinyfusion_pl.data.shards import LatentShards
from tinyfusion_pl.data.vae import VAE

# All labels of the published layout are read if there are fewer than this share of the classes.
FEW_CLASSES = 0.9
WANTED = (
    "ImageNet latents are a folder written by task=extract_latents, or one with "
    "imagenet256_features/N.npy (1, C, h, w) and imagenet256_labels/N.npy, as the published "
    "extraction script writes them."
)


class ImageNetLatents(GenerationDataModule):
    """Training batches of VAE latents of ImageNet, scaled for the denoiser.

    Args:
        root: Folder of shards (see `LatentShards`), or one with ``imagenet256_features/`` and
            ``imagenet256_labels/``. ``"random"``: random latents of the VAE, in shards in a
            temporary folder, to try out a recipe.
        vae: Creates the `VAE` that decodes latents, on first use. None: latents cannot be decoded.
        scaling_factor: Factor of the latents that the denoiser was trained on: 0.18215 with the VAE
            of Stable Diffusion, 0.2325 with that of MAR. The published folders hold scaled latents.
        images: Real images to compare samples with: class folders, or an npz file of image files.
            None: ``evaluate.reference`` is required. ``"random"``: noise, to try out a recipe.
        class_to_idx: Labels of the classes in shards and in `images`, in place of the recorded
            ones: ``"imagenet"``, ``"order"`` or a JSON file; see `label_classes`.
        batch_size: Samples per batch and process.
        seed: Seed of the order, of mirroring, and of the samples of mean and log-variance.
        num_workers: Worker processes that load samples.
        pictures: Deprecated name of `images`.

    Raises:
        ValueError: if the latents are missing or have another scale.
        ArtifactError: if they are unfinished or damaged.
    """

    num_classes = 1000

    def __init__(
        self,
        root: str | Path | None,
        *,
        vae: Callable[[], VAE] | None = None,
        scaling_factor: float = 0.18215,
        images: str | Path | None = None,
        class_to_idx: str | None = None,
        batch_size: int = 256,
        seed: int = 0,
        num_workers: int = 8,
        pictures: str | Path | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        if pictures is not None:
            if images is not None:
                raise ValueError(
                    f"Both images={images} and its deprecated name pictures={pictures} are given. "
                    "Give images only."
                )
            warnings.warn(
                "ImageNetLatents(pictures=...) is deprecated: use images=...",
                DeprecationWarning,
                stacklevel=2,
            )
            images = pictures
        self.make_vae, self.scaling_factor = vae, float(scaling_factor)
        self.images, self.class_to_idx = images, class_to_idx
        self._vae: VAE | None = None
        if root is None:
            raise ValueError(f"data.root is not set. {WANTED} Give data.root=FOLDER.")
        self.is_random = str(root) == RANDOM
        self.root = self._random_root() if self.is_random else Path(root)
        if (self.root / FINISHED).exists() or (self.root / UNFINISHED).exists():
            shards = LatentShards(self.root)
            drawn = DrawnLatents(shards, labels=self._get_labels(shards), seed=seed)
            self.shards: LatentShards | None = shards
            self._set: DrawnLatents | NumpyFolders = drawn
            self.latent_shape = shards.info.latent_shape
            self.num_classes = max(self._class_labels) + 1
            self._check_scale(shards.info.vae["scaling_factor"], f"The latents in {self.root}")
            drawn.check_values()
        else:
            self.shards, self._set = None, self._folders()
            if class_to_idx is not None and images is None:
                raise ValueError(
                    f"data.class_to_idx is {class_to_idx}, but the labels in {self._set.labels} "
                    "are numbers, not names of classes. Leave it out; or extract shards with "
                    "task=extract_latents, which record the names."
                )

    def train_set(self) -> Dataset:
        """Return the scaled latents and labels."""
        return self._set

    def samples_sha256(self) -> str:
        """Return a checksum of labels, sizes and a few latents."""
        return self._set.sha256()

    def decoder_sha256(self) -> str:
        """Return a checksum of the VAE."""
        return state_sha256(self.vae.model.state_dict(), preface=str(self.vae.scaling_factor))

    @property
    def vae(self) -> VAE:
        """The VAE, loaded and compared with the latents on first use.

        Raises:
            ValueError: if there is none or it does not match the latents.
            ArtifactError: if its weights cannot be loaded.
        """
        if self._vae is None:
            if self.make_vae is None:
                raise ValueError(
                    "Decoding latents needs the VAE, but data.vae is not set. Give vae@data.vae=sd "
                    "(or mar)."
                )
            vae = self.make_vae()
            self._check_vae(vae)
            self._vae = vae
        return self._vae

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (N, C, h, w) to images (N, 3, H, W), uint8.

        Raises:
            ValueError: for latents of another shape.
        """
        if latents.ndim != 4 or tuple(latents.shape[1:]) != tuple(self.latent_shape):
            shape = ", ".join(map(str, self.latent_shape))
            raise ValueError(
                f"The latents of {self.root} are (N, {shape}), got {tuple(latents.shape)}."
            )
        return self.vae.decode(latents)

    @property
    def classes(self) -> list[int] | None:
        """Labels of the latents, ascending; None for random latents: all classes."""
        if self.is_random:
            return None
        if isinstance(self._set, NumpyFolders):
            return self._set.classes
        return np.unique(self._set.labels).tolist()

    @cached_property
    def _real(self) -> RealImages:
        if self.images is None:
            raise ValueError(
                "No real images to compare samples with. Give evaluate.reference=FILE.npz (a "
                "reference file: a published one of ImageNet, or one written by task=reference) or "
                "data.images=PATH, images in class folders."
            )
        return RealImages(
            self.images,
            image_size=self.latent_shape[1] * self.vae.downsampling,
            class_to_idx=self.class_to_idx,
        )

    def reference_images(self) -> tuple[Tensor, Tensor]:
        """Load all of `images`, center crops of the size of decoded ones, and their labels."""
        if self.images is not None and str(self.images) == RANDOM:
            rank_zero_warn("The real images are noise: distances to them are meaningless.")
            return random_images(self.latent_shape[1] * self.vae.downsampling)
        return self._real.images_and_labels

    def reference_classes(self, *, num_classes: int) -> list[int] | None:
        """Return the labels of `images`, ascending; None for random images: all classes."""
        if self.images is not None and str(self.images) == RANDOM:
            return None
        return self._real.classes(num_classes=num_classes)

    def check_decode(self) -> None:
        """Load the VAE, and raise if it does not match the latents."""
        _ = self.vae

    def check_labels(self, num_classes: int) -> None:
        """Check the labels of all shards, or of a few files in the published layout."""
        if isinstance(self._set, NumpyFolders):
            labels = [self._set.label(i) for i in self._set.checked()]
            highest, lowest, where = max(labels), min(labels), str(self._set.labels)
        else:
            highest, lowest = int(self._set.labels.max()), int(self._set.labels.min())
            where = str(self.root)
        if lowest < 0 or highest >= num_classes:
            few = (
                self.shards is not None
                and self._labelled_by == IMAGENET
                and len(self._class_labels) <= num_classes
            )
            remedy = (
                " Or give data.class_to_idx=order if its classes are the order of class folders."
                if few
                else ""
            )
            raise ValueError(
                f"{where} has labels {lowest} to {highest}, but the model has classes 0 to "
                f"{num_classes - 1}. Give a model with num_classes > {highest}, or latents of its "
                f"classes.{remedy}"
            )
        if isinstance(self._set, NumpyFolders):
            self._set.num_classes = num_classes  # checks the other files when they are read
            if highest + 1 < FEW_CLASSES * num_classes:
                present = self._set.classes
                if present == list(range(len(present))):
                    rank_zero_warn(
                        f"{where} has only the labels 0 to {len(present) - 1}, but the model has "
                        f"{num_classes} classes. They may be the first classes of the model, or "
                        "those of a smaller data set, numbered in the order of its class folders. "
                        "If so, extract the latents again with task=extract_latents, or correct "
                        "the labels."
                    )
            return
        assert self.shards is not None
        if found := disagreement(
            self.shards.info.classes,
            self._class_labels,
            kind=self._labelled_by,
            num_classes=num_classes,
        ):
            why, certain = found
            message = (
                f"{where}: {why}. Give data.class_to_idx=FILE, a JSON file {{name: label}}; "
                "data.class_to_idx=imagenet if the names are wnids; or data.class_to_idx=order if "
                "0, 1, ... is right."
            )
            if certain:
                raise ValueError(message)
            rank_zero_warn(message)

    def _get_labels(self, shards: LatentShards) -> np.ndarray:
        """Return the labels of all samples (N,), by `class_to_idx` if it is given."""
        info = shards.info
        self._class_labels, self._labelled_by = info.labels_per_class, info.labelled_by
        if self.is_random:
            self._labelled_by = GIVEN
        elif self.class_to_idx is not None:
            self._class_labels, self._labelled_by, _ = label_classes(
                info.classes, class_to_idx=self.class_to_idx, where=str(shards.root)
            )
            return relabel(
                shards.labels, info.labels_per_class, self._class_labels, where=str(shards.root)
            )
        return shards.labels

    def _random_root(self) -> Path:
        if self.make_vae is None:
            raise ValueError(
                "data.root is 'random', but data.vae is not set; random latents have the shape of "
                "those of a VAE. Give vae@data.vae=sd."
            )
        rank_zero_warn("The latents are random: a model trained on them is meaningless.")
        self._temporary = tempfile.TemporaryDirectory(prefix="random_latents_")
        self._vae = self.make_vae()
        write_random_latents(Path(self._temporary.name), self._vae)
        return Path(self._temporary.name)

    def _folders(self) -> NumpyFolders:
        found = {
            kind: sorted(self.root.glob(f"imagenet*_{kind}")) for kind in ("features", "labels")
        }
        if missing := [
            f"{self.root / f'imagenet256_{kind}'}" for kind, folders in found.items() if not folders
        ]:
            raise ValueError(f"{' and '.join(missing)} not found. {WANTED}")
        if len(found["features"]) > 1 or len(found["labels"]) > 1:
            names = ", ".join(path.name for path in found["features"])
            raise ValueError(
                f"{self.root} holds latents of several sizes ({names}). Give a folder with one of "
                "them."
            )
        folders = NumpyFolders(found["features"][0], found["labels"][0])
        self.latent_shape = folders.shape
        folders.check_scale(self.scaling_factor)
        return folders

    def _check_scale(self, scaling_factor: float, what: str) -> None:
        if abs(scaling_factor - self.scaling_factor) > 1e-4 * self.scaling_factor:
            raise ValueError(
                f"{what} are scaled by {scaling_factor}, but the model was trained with "
                f"data.scaling_factor={self.scaling_factor} (Stable Diffusion's VAE 0.18215; MAR's "
                "0.2325, data=imagenet_latents_mar)."
            )

    def _check_vae(self, vae: VAE) -> None:
        self._check_scale(vae.scaling_factor, f"Latents of the VAE {vae.source}")
        channels, height, _ = self.latent_shape
        if vae.num_channels != channels:
            raise ValueError(
                f"The latents of the VAE {vae.source} have {vae.num_channels} channels, but those "
                f"in {self.root} have {channels}. Set data.vae.source to the VAE that encoded them."
            )
        if self.shards is None:
            return
        made: dict[str, Any] = self.shards.info.vae
        if self.shards.info.image_size != height * vae.downsampling:
            raise ValueError(
                f"The VAE {vae.source} decodes latents of size {height} to "
                f"{height * vae.downsampling} pixels, but those in {self.root} were encoded from "
                f"{self.shards.info.image_size} pixels."
            )
        if made["encoder"] != vae.record()["encoder"]:
            raise ValueError(
                f"The VAE {vae.source} did not encode the latents in {self.root}: its encoder "
                f"differs from that of {made['source']}. Set data.vae.source to that VAE, or one "
                "with the same encoder."
            )
