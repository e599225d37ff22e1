"""ImageNet latents: shards of task=extract_latents, or the folders of the published extraction, one ``N.npy`` an image."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from tinyfusion_pl.artifacts import ArtifactError
from tinyfusion_pl.checksums import state_sha256
from tinyfusion_pl.data.base import GenerationDataModule
from tinyfusion_pl.data.classes import GIVEN, IMAGENET, disagreement, label_classes, relabel
from tinyfusion_pl.data.latents_info import FINISHED, UNFINISHED
from tinyfusion_pl.data.numpy_folders import (
    MAX_SCALED,
    MAX_SCALED_STD,
    MIN_SCALED_STD,
    NUM_CHECKED,
    NumpyFolders,
)
from tinyfusion_pl.data.random_latents import RANDOM, random_images, write_random_latents
from tinyfusion_pl.data.real_images import RealImages
from tinyfusion_pl.data.shards import (
    LatentShards,
    get_generator,
    normal,
    posterior_sample,
    shard_path,
)
from tinyfusion_pl.data.vae import VAE

MIN_STD, MAX_STD = 0.01, 30.0  # beyond these no VAE's latents are, a random one's included
FEW_CLASSES = 0.9  # the share of the model's classes below which all labels of the published layout are looked at


class DrawnLatents(Dataset):
    """``(draw, index)`` -> training sample (x (C, h, w) float32 scaled, y ()).

    Whether the image is mirrored (one half of the draws) and the sample of mean and log-variance are functions of (seed, draw): an
    interrupted run goes on with the very numbers that it would have seen.
    """

    takes_draws = True

    def __init__(
        self, shards: LatentShards, *, labels: np.ndarray | None = None, seed: int = 0
    ) -> None:
        self.shards, self.seed = shards, seed
        self.labels = shards.labels if labels is None else labels
        self.scaling_factor = np.float32(shards.info.vae["scaling_factor"])

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, draw_and_index: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return self.__getitems__([draw_and_index])[0]

    def __getitems__(self, draws_and_indices: list[tuple[int, int]]) -> list[tuple[Tensor, Tensor]]:
        """A batch at once, as a DataLoader asks for it: a third of the time of one sample after the other."""
        info = self.shards.info
        draws, indices = zip(*draws_and_indices)
        generators = [get_generator(self.seed, draw) for draw in draws]
        mirrored = [int(generator.random() < 0.5) for generator in generators]
        latents = self.shards.read_many(indices, mirrored)  # (N, C', h, w)
        if info.content == "moments":
            latents = posterior_sample(
                latents,
                np.stack([normal(generator, info.latent_shape) for generator in generators]),
            )
        x = torch.from_numpy(latents * self.scaling_factor)  # (N, C, h, w)
        return list(zip(x, torch.from_numpy(self.labels[list(indices)])))

    def check_values(self) -> None:
        """Find out, by a few samples, whether the shards hold latents; warn where their scale is unusual.

        Raises:
            ArtifactError: when a sample is constant, or they are smaller or larger than latents can be.
        """
        indices = np.unique(np.linspace(0, len(self) - 1, NUM_CHECKED).astype(int)).tolist()
        x = torch.stack(
            [x for x, _ in self.__getitems__([(draw, index) for draw, index in enumerate(indices)])]
        )  # (n, C, h, w)
        self.shards.close()
        if float(x.abs().max()) > MAX_SCALED:
            raise ArtifactError(
                f"{self.shards.root}: the {len(indices)} samples looked at hold values up to {x.abs().max():.3g}, where "
                "scaled latents stay below 10. Extract them again."
            )
        std, made = float(x.std()), self.shards.info.vae
        if (
            x.numel() == 1
            or MIN_SCALED_STD <= std <= MAX_SCALED_STD
            or str(made["source"]) == RANDOM
        ):
            return
        what = (
            f"{self.shards.root}: the latents have, times their scaling factor {self.scaling_factor:g}, a standard deviation of "
            f"{std:.3g}, where about 1 is usual"
        )
        if not MIN_STD <= std <= MAX_STD:
            raise ArtifactError(
                f"{what}: they are damaged, or were scaled before they were written. Extract them again."
            )
        rank_zero_warn(
            f"{what}: they were scaled before they were written, or the factor is another VAE's; or the VAE ({made['source']}) "
            "is an unusual or untrained one."
        )

    def sha256(self) -> str:
        """A checksum of description, labels, sizes of all shards, and a few samples."""
        indices = np.unique(np.linspace(0, len(self) - 1, NUM_CHECKED).astype(int)).tolist()
        stored = self.shards.read_many(indices, [0] * len(indices))
        self.shards.close()
        sizes = [
            shard_path(self.shards.root, shard).stat().st_size
            for shard in range(self.shards.info.num_shards)
        ]
        info = {
            key: value
            for key, value in self.shards.info.as_dict().items()
            if key not in ("images", "labelled_by")
        }
        return state_sha256(
            {"labels": torch.from_numpy(self.labels), "stored": torch.from_numpy(stored)},
            preface=json.dumps([info, sizes], sort_keys=True),
        )


class ImageNetLatents(GenerationDataModule):
    """Training batches of VAE latents of ImageNet, scaled as the denoiser eats them.

    Args:
        root: Folder of shards (see `LatentShards`), or one with ``imagenet256_features/`` and ``imagenet256_labels/``. ``"random"``: random
            latents of the VAE, in shards in a temporary folder, to try a recipe with.
        vae: Makes the `VAE` that turns latents into images; called when it is needed. None: they cannot be.
        scaling_factor: Of the latents that the denoiser works on: 0.18215 with Stable Diffusion's VAE, 0.2325 with MAR's. The reference's
            folders hold scaled latents.
        images: Real images (class folders, or an npz of image files) that samples are held against; None: ``evaluate.reference`` has to
            say what. ``"random"``: noise, to try a recipe with.
        class_to_idx: Labels of the classes in shards and in `images`, in place of those that they have: ``"imagenet"``, ``"order"`` or a
            JSON file, see `label_classes`.
        batch_size, seed, num_workers: See `GenerationDataModule`; the seed also fixes mirroring and the samples of mean and log-variance.

    Raises:
        ValueError, ArtifactError: when the latents are missing, unfinished, broken, or of another scale; says how to get them.
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
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        self.make_vae, self.scaling_factor, self.images, self._vae = (
            vae,
            float(scaling_factor),
            images,
            None,
        )
        self.class_to_idx = class_to_idx
        wanted = (
            "It needs ImageNet's VAE latents: a folder made by task=extract_latents, or one with imagenet256_features/N.npy "
            "(1, C, h, w) and imagenet256_labels/N.npy, as the published extraction script writes them."
        )
        if root is None:
            raise ValueError(f"data.root is not set. {wanted} Give data.root=FOLDER.")
        self.is_random = str(root) == RANDOM
        self.root = self._random_root() if self.is_random else Path(root)
        if (self.root / FINISHED).exists() or (self.root / UNFINISHED).exists():
            self.shards: LatentShards | None = LatentShards(self.root)
            self._set = DrawnLatents(self.shards, labels=self._get_labels(self.shards), seed=seed)
            self.latent_shape, self.num_classes = (
                self.shards.info.latent_shape,
                max(self._class_labels) + 1,
            )
            self._check_scale(self.shards.info.vae["scaling_factor"], f"The latents in {self.root}")
            self._set.check_values()
        else:
            self.shards, self._set = None, self._folders(wanted)
            if class_to_idx is not None and images is None:
                raise ValueError(
                    f"data.class_to_idx is {class_to_idx}, but the labels in {self._set.labels} are numbers, not names of "
                    "classes. Leave it out; or extract shards with task=extract_latents, which know the names."
                )

    def train_set(self) -> Dataset:
        return self._set

    def samples_sha256(self) -> str:
        return self._set.sha256()

    def decoder_sha256(self) -> str:
        return state_sha256(self.vae.model.state_dict(), preface=str(self.vae.scaling_factor))

    @property
    def vae(self) -> VAE:
        """The VAE, loaded when it is first asked for, and found to match the latents.

        Raises:
            ValueError, ArtifactError: when there is none or it does not match.
        """
        if self._vae is None:
            if self.make_vae is None:
                raise ValueError(
                    "Turning latents into images needs the VAE, and data.vae is not set. Give vae@data.vae=sd (or mar)."
                )
            vae = self.make_vae()
            self._check_vae(vae)
            self._vae = vae
        return self._vae

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (N, C, h, w) to images (N, 3, H, W), uint8. ValueError for latents of another shape."""
        if latents.ndim != 4 or tuple(latents.shape[1:]) != tuple(self.latent_shape):
            shape = ", ".join(map(str, self.latent_shape))
            raise ValueError(
                f"The latents of {self.root} are (N, {shape}); these are {tuple(latents.shape)}."
            )
        return self.vae.decode(latents)

    @property
    def classes(self) -> list[int] | None:
        if self.is_random:
            return None  # as of all classes, however few samples there are
        return (
            np.unique(self._set.labels).tolist() if self.shards is not None else self._set.classes
        )

    @cached_property
    def _real(self) -> RealImages:
        if self.images is None:
            raise ValueError(
                "There are no real images to hold samples against. Give evaluate.reference=FILE.npz (a reference file: the "
                "published ImageNet ones, or one that task=reference makes), or data.images=PATH, images in class folders."
            )
        return RealImages(
            self.images,
            image_size=self.latent_shape[1] * self.vae.downsampling,
            class_to_idx=self.class_to_idx,
        )

    def reference_images(self) -> tuple[Tensor, Tensor]:
        """The images of `images`, centre crops of the size that `decode` gives, and their labels. All are held in memory."""
        if self.images is not None and str(self.images) == RANDOM:
            rank_zero_warn(
                "The real images that samples are held against are noise: every distance to them means nothing."
            )
            return random_images(self.latent_shape[1] * self.vae.downsampling)
        return self._real.images_and_labels

    def reference_classes(self, *, num_classes: int) -> list[int] | None:
        if self.images is not None and str(self.images) == RANDOM:
            return None
        return self._real.classes(num_classes=num_classes)

    def check_decode(self) -> None:
        self.vae  # noqa: B018

    def check_labels(self, num_classes: int) -> None:
        if self.shards is not None:
            highest, lowest, where = (
                int(self._set.labels.max()),
                int(self._set.labels.min()),
                str(self.root),
            )
        else:
            labels = [self._set.label(i) for i in self._checked()]
            highest, lowest, where = max(labels), min(labels), str(self._set.labels)
        if lowest < 0 or highest >= num_classes:
            few = (
                self.shards is not None
                and self._labelled_by == IMAGENET
                and len(self._class_labels) <= num_classes
            )
            remedy = (
                " Or give data.class_to_idx=order, if its classes are the order of the class folders."
                if few
                else ""
            )
            raise ValueError(
                f"{where} has labels {lowest} to {highest}, but the model knows the classes 0 to {num_classes - 1}. "
                f"Give a model with num_classes > {highest}, or latents of its classes.{remedy}"
            )
        if self.shards is None:  # the files that were not looked at
            self._set.num_classes = num_classes
            if highest + 1 < FEW_CLASSES * num_classes and (present := self._set.classes) == list(
                range(len(present))
            ):
                rank_zero_warn(
                    f"{where} has the labels 0 to {len(present) - 1} alone, and the model has {num_classes} classes: they may "
                    "be its first ones, or those of a smaller data set whose class folders were numbered by order. In the "
                    "second case extract the latents again with task=extract_latents, or correct the labels."
                )
        elif found := disagreement(
            self.shards.info.classes,
            self._class_labels,
            kind=self._labelled_by,
            num_classes=num_classes,
        ):
            why, certain = found
            message = (
                f"{where}: {why}. Give data.class_to_idx=FILE, a JSON file {{name: label}}, data.class_to_idx=imagenet where the "
                "names are wnids, or data.class_to_idx=order if 0, 1, ... is right."
            )
            if certain:
                raise ValueError(message)
            rank_zero_warn(message)

    def _get_labels(self, shards: LatentShards) -> np.ndarray:
        """The labels of all samples, (N,), by `class_to_idx` where it is given."""
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
                "data.root is 'random', but data.vae is not set, and random latents are those of a VAE. Give vae@data.vae=sd."
            )
        rank_zero_warn("The latents are random numbers: what is learned of them means nothing.")
        self._temporary = tempfile.TemporaryDirectory(prefix="random_latents_")
        self._vae = self.make_vae()
        write_random_latents(Path(self._temporary.name), self._vae)
        return Path(self._temporary.name)

    def _folders(self, wanted: str) -> NumpyFolders:
        found = {
            kind: sorted(self.root.glob(f"imagenet*_{kind}")) for kind in ("features", "labels")
        }
        if missing := [
            f"{self.root / f'imagenet256_{kind}'}" for kind, folders in found.items() if not folders
        ]:
            raise ValueError(f"There is no {' and no '.join(missing)}. {wanted}")
        if len(found["features"]) > 1 or len(found["labels"]) > 1:
            names = ", ".join(path.name for path in found["features"])
            raise ValueError(
                f"{self.root} holds latents of several sizes, {names}. Give a folder with one of them."
            )
        folders = NumpyFolders(found["features"][0], found["labels"][0])
        self.latent_shape = folders.shape
        folders.check_scale(self.scaling_factor)
        return folders

    def _checked(self) -> list[int]:
        return self._set.checked()

    def _check_scale(self, scaling_factor: float, what: str) -> None:
        if abs(scaling_factor - self.scaling_factor) > 1e-4 * self.scaling_factor:
            raise ValueError(
                f"{what} are scaled by {scaling_factor}, but data.scaling_factor is {self.scaling_factor}, the scale that the "
                "model was trained on (Stable Diffusion's VAE 0.18215; MAR's 0.2325, data=imagenet_latents_mar)."
            )

    def _check_vae(self, vae: VAE) -> None:
        self._check_scale(vae.scaling_factor, f"Latents of the VAE of {vae.source}")
        channels, height, _ = self.latent_shape
        if vae.num_channels != channels:
            raise ValueError(
                f"The VAE of {vae.source} has latents of {vae.num_channels} channels, those in {self.root} have {channels}. "
                "Give data.vae.source the VAE that they were made with."
            )
        if self.shards is None:
            return
        made: dict[str, Any] = self.shards.info.vae
        if self.shards.info.image_size != height * vae.downsampling:
            raise ValueError(
                f"The VAE of {vae.source} makes images of {height * vae.downsampling} pixels from latents of {height}; "
                f"those in {self.root} were made of {self.shards.info.image_size} pixels."
            )
        if made["encoder"] != vae.record()["encoder"]:
            raise ValueError(
                f"The VAE of {vae.source} is not the one that made the latents in {self.root} ({made['source']}): their "
                "encoders differ. Give data.vae.source that one, or one with the same encoder."
            )
