"""Base class of the data modules: a resumable stream of latents and labels."""

import functools
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, cast

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import Dataset

from tinyfusion_pl.data.sampler import StreamLoader, StreamSampler


class GenerationDataModule(LightningDataModule, ABC):
    """Training batches ``(x, y)``: latents x, float32 (N, C, H, W), and labels y, int64 (N,).

    A subclass defines `latent_shape`, `num_classes`, `train_set`, `decode` and `reference_images`.

    Every batch is full: the remainder of an epoch starts the first batch of the next epoch. The
    order depends on `seed` alone and the checkpoint holds the position, so a resumed run sees the
    same batches as an uninterrupted one, with any number of workers or accumulated batches. With
    `Trainer(max_steps=...)` alone, one Lightning "epoch" is the whole fit; with `max_epochs` it is
    one pass over the data.

    Args:
        batch_size: Samples per batch and process.
        seed: Seed of the order of samples.
        num_workers: Worker processes that load samples; 0 loads them in the training process.
    """

    latent_shape: tuple[int, int, int]
    num_classes: int

    def __init__(self, *, batch_size: int, seed: int = 0, num_workers: int = 0) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("num_workers", num_workers, 0),
        ):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}. Give an integer >= {least}.")
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self._restored = {"num_batches": 0, "num_draws": 0}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _alias_reference_pictures(cls)

    @abstractmethod
    def train_set(self) -> Dataset:
        """Return the training samples: a map-style dataset of ``(x (C, H, W), y ())``.

        A dataset with ``takes_draws = True`` is indexed by ``(draw, index)``. `draw` is the
        position in the stream; random augmentation should depend on it and the seed alone.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (N, C, H, W) to images (N, channels, height, width), uint8."""

    @abstractmethod
    def reference_images(self) -> tuple[Tensor, Tensor]:
        """Return real images in the format of `decode`, and their labels (N,), to compare with."""

    def samples_sha256(self) -> str | None:
        """Return a checksum of the training samples, to detect replaced data; None: unknown."""
        return None

    def decoder_sha256(self) -> str | None:
        """Return a checksum of what `decode` uses; None: nothing to replace, or unknown."""
        return None

    @property
    def classes(self) -> list[int] | None:
        """Labels of the training samples, ascending; None: all classes of the model."""
        return None

    def reference_classes(self, *, num_classes: int) -> list[int] | None:
        """Return the labels of `reference_images`, ascending; None: all `num_classes`.

        Raises:
            ValueError: if they may not be the classes of the model.
        """
        return self.reference_images()[1].unique().tolist()

    def check_fits(self, denoiser: nn.Module) -> None:
        """Check, before training, that `denoiser` fits these latents and labels.

        Raises:
            ValueError: if its latents have another shape, or it has too few classes.
        """
        self.check_latents(denoiser)
        self.check_labels(cast(Any, denoiser).num_classes)

    def check_labels(self, num_classes: int) -> None:
        """Check that the labels are those of a model with `num_classes` classes.

        Warns if they may be others.

        Raises:
            ValueError: if they are not.
        """
        if (
            self.classes is not None
            and self.classes
            and not 0 <= min(self.classes) <= max(self.classes) < num_classes
        ):
            raise ValueError(
                f"The data has labels {min(self.classes)} to {max(self.classes)}, but the model "
                f"has classes 0 to {num_classes - 1}. Give a model with these classes, or data "
                "with its classes."
            )

    def check_latents(self, denoiser: nn.Module) -> None:
        """Raise `ValueError` if `denoiser` expects latents of another shape."""
        config = getattr(denoiser, "config", {})
        side = config.get("input_size")
        expected = getattr(denoiser, "latent_shape", None) or (
            side and (config.get("in_channels"), side, side)
        )
        if expected and tuple(expected) != tuple(self.latent_shape):
            raise ValueError(
                f"The latents of the data are (C, H, W) = {tuple(self.latent_shape)}, but the "
                f"model expects {tuple(expected)}. Give latents of that shape, or a model for "
                "these."
            )

    def check_processes(self, num_processes: int) -> None:
        """Raise `ValueError` if there are fewer training samples than processes."""
        if num_processes > (num_samples := _length(self.train_set())):
            raise ValueError(
                f"There are {num_processes} processes, but only {num_samples} training samples. "
                "Use fewer devices."
            )

    def check_decode(self) -> None:
        """Raise `ValueError` or `ArtifactError` if `decode` cannot work."""

    def train_dataloader(self) -> StreamLoader:
        """Return a loader of the stream from the current position on."""
        overfit_batches = getattr(self.trainer, "overfit_batches", 0)
        if overfit_batches:
            raise ValueError(
                f"Trainer(overfit_batches={overfit_batches}) would replace the order of this data "
                "module, which can be resumed. Leave it out; to shorten a run, use max_steps or "
                "limit_train_batches."
            )
        dataset = self.train_set()
        ranks = self._ranks
        self.check_processes(ranks["num_replicas"])
        num_samples = _length(dataset)
        sampler = StreamSampler(
            num_samples,
            num_draws=self.batch_size * self._batches_per_pass(num_samples),
            seed=self.seed,
            first_draw=self._num_draws,
            with_draws=getattr(dataset, "takes_draws", False),
            **ranks,
        )
        return StreamLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            # The default generator, which draws the seeds of the workers, is that of the noise.
            generator=torch.Generator().manual_seed(self.seed + ranks["rank"]),
        )

    def setup(self, stage: str) -> None:
        """Forget the position of an earlier fit; Lightning restores the current one afterwards."""
        self._restored = {"num_batches": 0, "num_draws": 0}

    def state_dict(self) -> dict[str, int]:
        """Return the position in the stream: batches per process, samples over all processes."""
        return {"num_batches": self._num_batches(), "num_draws": self._num_draws()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restore a position in the stream."""
        self._restored = dict(state_dict)

    @property
    def _ranks(self) -> dict[str, int]:
        return (self.trainer and self.trainer.distributed_sampler_kwargs) or {
            "rank": 0,
            "num_replicas": 1,
        }

    def _batches_per_pass(self, num_samples: int) -> int:
        trainer = self.trainer
        if trainer is not None and trainer.max_steps > 0 and trainer.max_epochs in (None, -1):
            return trainer.max_steps * trainer.accumulate_grad_batches
        return math.ceil(num_samples / (self.batch_size * self._ranks["num_replicas"]))

    def _num_batches(self) -> int:
        # `processed` counts a batch once its training step ends: before callbacks save checkpoints,
        # and never for an interrupted step. Lightning restores it after this object's state, so
        # the larger number is the current one.
        if self.trainer is None:
            return self._restored["num_batches"]
        total: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return max(self._restored["num_batches"], total.processed)

    def _num_draws(self) -> int:
        since = self._num_batches() - self._restored["num_batches"]
        return self._restored["num_draws"] + since * self.batch_size * self._ranks["num_replicas"]


def _length(dataset: Dataset) -> int:
    return len(cast(Any, dataset))  # torch declares no length of a map-style dataset


def _alias_reference_pictures(cls: Any) -> None:
    """Keep the old name `reference_pictures` of `reference_images`, with a warning."""
    own = vars(cls)
    if "reference_pictures" in own and "reference_images" not in own:
        warnings.warn(
            f"{cls.__name__} defines reference_pictures, which is deprecated: rename it to "
            "reference_images.",
            DeprecationWarning,
            stacklevel=4,
        )
        cls.reference_images = own["reference_pictures"]
    elif "reference_images" in own and "reference_pictures" not in own:
        cls.reference_pictures = _deprecated_reference_pictures(own["reference_images"])


def _deprecated_reference_pictures(
    reference_images: Callable[..., tuple[Tensor, Tensor]],
) -> Callable[..., tuple[Tensor, Tensor]]:
    @functools.wraps(reference_images)
    def reference_pictures(self: GenerationDataModule) -> tuple[Tensor, Tensor]:
        warnings.warn(
            "reference_pictures is deprecated: call reference_images.",
            DeprecationWarning,
            stacklevel=2,
        )
        return reference_images(self)

    return reference_pictures
