"""ImageNet latents: shards of task=extract_latents, or the folders of the published extraction, one ``N.npy`` an image."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import Dataset

from tinyfusion_pl.artifacts import ArtifactError
from tinyfusion_pl.data.base import GenerationDataModule
from tinyfusion_pl.data.images import open_images
from tinyfusion_pl.data.random_latents import RANDOM, random_pictures, write_random_latents
from tinyfusion_pl.data.shards import FINISHED, UNFINISHED, LatentShards, generator_of, normal, posterior_sample
from tinyfusion_pl.data.vae import VAE

NUM_CHECKED = 32  # of the reference's files before training; each is checked when it is read
MAX_SCALED_STD = 3.0  # scaled latents have a standard deviation of about 1, those of Stable Diffusion's VAE before scaling 5.5


class DrawnLatents(Dataset):
    """``(draw, index)`` -> training sample (x (C, h, w) float32 scaled, y ()).

    Whether the picture is mirrored (one half of the draws) and the sample of mean and log-variance are functions of (seed, draw): an
    interrupted run goes on with the very numbers that it would have seen.
    """

    takes_draws = True

    def __init__(self, shards: LatentShards, *, seed: int = 0) -> None:
        self.shards, self.seed = shards, seed
        self.scaling_factor = np.float32(shards.info.vae["scaling_factor"])

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, draw_and_index: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return self.__getitems__([draw_and_index])[0]

    def __getitems__(self, draws_and_indices: list[tuple[int, int]]) -> list[tuple[Tensor, Tensor]]:
        """A batch at once, as a DataLoader asks for it: a third of the time of one sample after the other."""
        info = self.shards.info
        draws, indices = zip(*draws_and_indices)
        generators = [generator_of(self.seed, draw) for draw in draws]
        mirrored = [int(generator.random() < 0.5) for generator in generators]
        latents = self.shards.read_many(indices, mirrored)  # (N, C', h, w)
        if info.content == "moments":
            latents = posterior_sample(latents, np.stack([normal(generator, info.latent_shape) for generator in generators]))
        x = torch.from_numpy(latents * self.scaling_factor)  # (N, C, h, w)
        return list(zip(x, torch.from_numpy(self.shards.labels[list(indices)])))


class NumpyFolders(Dataset):
    """``features/N.npy`` (1, C, H, W) float with ``labels/N.npy`` (1,) integer, for N = 0, 1, ..."""

    def __init__(self, features: Path, labels: Path) -> None:
        self.features, self.labels = features, labels
        names = [path.name for path in features.glob("*.npy")]
        if wrong := [name for name in names if not name.removesuffix(".npy").isdecimal()]:
            raise ArtifactError(f"{features / wrong[0]} is no N.npy with a number N, as the published extraction writes them. Remove it.")
        self.names = sorted(names, key=lambda name: int(name.removesuffix(".npy")))
        self.shape: tuple[int, ...] | None = None  # that all must have, once it is known
        self.num_classes: int | None = None  # that the labels must be below, likewise

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        name = self.names[index]
        try:
            x, y = np.load(self.features / name), np.load(self.labels / name)
            latents, label = torch.from_numpy(x).float().squeeze(0), torch.from_numpy(y).long().reshape(())  # (C, H, W), ()
        except (OSError, ValueError, EOFError, TypeError, RuntimeError) as error:
            raise ArtifactError(f"Latent {self.features / name} or its label in {self.labels} cannot be read: {error}. Put it back, and "
                                "the same command goes on.") from error
        if self.shape is not None and latents.shape != self.shape:
            raise ArtifactError(f"{self.features / name} is {tuple(latents.shape)}, the others are {tuple(self.shape)}.")
        if not torch.isfinite(latents).all():
            raise ArtifactError(f"{self.features / name} holds values that are not finite: the file is damaged. Extract it again.")
        if self.num_classes is not None and not 0 <= label < self.num_classes:
            raise ArtifactError(f"{self.labels / name} has the label {int(label)}, but the model knows the classes 0 to "
                                f"{self.num_classes - 1}. Give a model with more classes, or put the right label there.")
        return latents, label


class ImageNetLatents(GenerationDataModule):
    """Training batches of VAE latents of ImageNet, scaled as the denoiser eats them.

    Args:
        root: Folder of shards (see `LatentShards`), or one with ``imagenet256_features/`` and ``imagenet256_labels/``. ``"random"``: random
            latents of the VAE, in shards in a temporary folder, to try a recipe with.
        vae: Makes the `VAE` that turns latents into pictures; called when it is needed. None: they cannot be.
        scaling_factor: Of the latents that the denoiser works on: 0.18215 with Stable Diffusion's VAE, 0.2325 with MAR's. The reference's
            folders hold scaled latents.
        pictures: Real images (class folders, or an npz of image files) that samples are held against; None: ``evaluate.reference`` has to
            say what. ``"random"``: noise, to try a recipe with.
        batch_size, seed, num_workers: See `GenerationDataModule`; the seed also fixes mirroring and the samples of mean and log-variance.

    Raises:
        ValueError, ArtifactError: when the latents are missing, unfinished, broken, or of another scale; says how to get them.
    """

    num_classes = 1000

    def __init__(self, root: str | Path | None, *, vae: Callable[[], VAE] | None = None, scaling_factor: float = 0.18215,
                 pictures: str | Path | None = None, batch_size: int = 256, seed: int = 0, num_workers: int = 8) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        self.make_vae, self.scaling_factor, self.pictures, self._vae = vae, float(scaling_factor), pictures, None
        wanted = ("It needs ImageNet's VAE latents: a folder made by task=extract_latents, or one with imagenet256_features/N.npy "
                  "(1, C, h, w) and imagenet256_labels/N.npy, as the published extraction script writes them.")
        if root is None:
            raise ValueError(f"data.root is not set. {wanted} Give data.root=FOLDER.")
        self.root = self._random_root() if str(root) == RANDOM else Path(root)
        if (self.root / FINISHED).exists() or (self.root / UNFINISHED).exists():
            self.shards: LatentShards | None = LatentShards(self.root)
            self._set = DrawnLatents(self.shards, seed=seed)
            self.latent_shape, self.num_classes = self.shards.info.latent_shape, len(self.shards.info.classes)
            self._check_scale(self.shards.info.vae["scaling_factor"], f"The latents in {self.root}")
        else:
            self.shards, self._set = None, self._folders(wanted)

    def train_set(self) -> Dataset:
        return self._set

    @property
    def vae(self) -> VAE:
        """The VAE, loaded when it is first asked for, and found to match the latents.

        Raises:
            ValueError, ArtifactError: when there is none or it does not match.
        """
        if self._vae is None:
            if self.make_vae is None:
                raise ValueError("Turning latents into pictures needs the VAE, and data.vae is not set. Give vae@data.vae=sd (or mar).")
            vae = self.make_vae()
            self._check_vae(vae)
            self._vae = vae
        return self._vae

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (N, C, h, w) to pictures (N, 3, H, W), uint8. ValueError for latents of another shape."""
        if latents.ndim != 4 or tuple(latents.shape[1:]) != tuple(self.latent_shape):
            shape = ", ".join(map(str, self.latent_shape))
            raise ValueError(f"The latents of {self.root} are (N, {shape}); these are {tuple(latents.shape)}.")
        return self.vae.decode(latents)

    def reference_pictures(self) -> tuple[Tensor, Tensor]:
        """The images of `pictures`, centre crops of the size that `decode` gives, and their labels. All are held in memory."""
        if self.pictures is None:
            raise ValueError("There are no real pictures to hold samples against. Give evaluate.reference=FILE.npz (a reference file: the "
                             "published ImageNet ones, or one that task=reference makes), or data.pictures=PATH, images in class folders.")
        image_size = self.latent_shape[1] * self.vae.downsampling
        if str(self.pictures) == RANDOM:
            rank_zero_warn("The real pictures that samples are held against are noise: every distance to them means nothing.")
            return random_pictures(image_size)
        images = open_images(self.pictures, image_size=image_size)
        return torch.stack([images[i][0] for i in range(len(images))]), torch.from_numpy(images.labels)

    def check_decode(self) -> None:
        self.vae  # noqa: B018  (loads and checks it)

    def check_fits(self, denoiser: nn.Module) -> None:
        super().check_fits(denoiser)
        if self.shards is not None:
            highest, lowest, where = int(self.shards.labels.max()), int(self.shards.labels.min()), str(self.root)
        else:
            labels = [int(self._set[i][1]) for i in self._checked()]
            highest, lowest, where = max(labels), min(labels), str(self._set.labels)
        if lowest < 0 or highest >= denoiser.num_classes:
            raise ValueError(f"{where} has labels {lowest} to {highest}, but the model knows the classes 0 to {denoiser.num_classes - 1}. "
                             f"Give a model with num_classes > {highest}, or latents of its classes.")
        if self.shards is None:  # the files that were not looked at
            self._set.num_classes = denoiser.num_classes

    def _random_root(self) -> Path:
        if self.make_vae is None:
            raise ValueError("data.root is 'random', but data.vae is not set, and random latents are those of a VAE. Give vae@data.vae=sd.")
        rank_zero_warn("The latents are random numbers: what is learned of them means nothing.")
        self._temporary = tempfile.TemporaryDirectory(prefix="random_latents_")
        self._vae = self.make_vae()
        write_random_latents(Path(self._temporary.name), self._vae)
        return Path(self._temporary.name)

    def _folders(self, wanted: str) -> NumpyFolders:
        found = {kind: sorted(self.root.glob(f"imagenet*_{kind}")) for kind in ("features", "labels")}
        if missing := [f"{self.root / f'imagenet256_{kind}'}" for kind, folders in found.items() if not folders]:
            raise ValueError(f"There is no {' and no '.join(missing)}. {wanted}")
        if len(found["features"]) > 1 or len(found["labels"]) > 1:
            names = ", ".join(path.name for path in found["features"])
            raise ValueError(f"{self.root} holds latents of several sizes, {names}. Give a folder with one of them.")
        folders = NumpyFolders(found["features"][0], found["labels"][0])
        names = {path.name for path in folders.labels.glob("*.npy")}
        if not len(folders) or set(folders.names) != names:
            raise ValueError(f"{folders.features} holds {len(folders)} latents, {folders.labels} {len(names)} labels; "
                             "each N.npy must be in both.")
        first = folders[0][0]
        if first.ndim != 3:
            raise ArtifactError(f"{folders.features / folders.names[0]} is no latent (1, C, h, w) or (C, h, w).")
        self.latent_shape = folders.shape = tuple(first.shape)
        self._set = folders
        if (std := float(torch.stack([folders[i][0] for i in self._checked()]).std())) > MAX_SCALED_STD:
            raise ValueError(f"The latents in {folders.features} have a standard deviation of {std:.2f}, where scaled ones have about 1: "
                             f"they look as if they had not been multiplied by the VAE's scaling factor ({self.scaling_factor}).")
        return folders

    def _checked(self) -> list[int]:
        return np.unique(np.linspace(0, len(self._set) - 1, NUM_CHECKED).astype(int)).tolist()

    def _check_scale(self, scaling_factor: float, what: str) -> None:
        if abs(scaling_factor - self.scaling_factor) > 1e-4 * self.scaling_factor:
            raise ValueError(f"{what} are scaled by {scaling_factor}, but data.scaling_factor is {self.scaling_factor}, the scale that the "
                             "model was trained on (Stable Diffusion's VAE 0.18215; MAR's 0.2325, data=imagenet_latents_mar).")

    def _check_vae(self, vae: VAE) -> None:
        self._check_scale(vae.scaling_factor, f"Latents of the VAE of {vae.source}")
        channels, height, _ = self.latent_shape
        if vae.num_channels != channels:
            raise ValueError(f"The VAE of {vae.source} has latents of {vae.num_channels} channels, those in {self.root} have {channels}. "
                             "Give data.vae.source the VAE that they were made with.")
        if self.shards is None:
            return
        made: dict[str, Any] = self.shards.info.vae
        if self.shards.info.image_size != height * vae.downsampling:
            raise ValueError(f"The VAE of {vae.source} makes pictures of {height * vae.downsampling} pixels from latents of {height}; "
                             f"those in {self.root} were made of {self.shards.info.image_size} pixels.")
        if made["encoder"] != vae.record()["encoder"]:
            raise ValueError(f"The VAE of {vae.source} is not the one that made the latents in {self.root} ({made['source']}): their "
                             "encoders differ. Give data.vae.source that one, or one with the same encoder.")
