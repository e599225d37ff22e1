"""What every data set of latents and labels shares: a resumable stream of batches, and the way back to images."""

import math
from abc import ABC, abstractmethod

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import Dataset

from tinyfusion_pl.data.sampler import StreamLoader, StreamSampler


class GenerationDataModule(LightningDataModule, ABC):
    """Training batches ``(x, y)``: x float32 (N, C, H, W) as the denoiser eats it, y int64 (N,) labels.

    A subclass gives `latent_shape`, `num_classes`, `train_set`, `decode` and `reference_images`.

    Every batch is full: an epoch's rest opens the first batch of the next epoch. The order depends on `seed` alone, and
    the checkpoint holds the position, so that a resumed run sees the very batches that the interrupted one would have
    seen, with any number of workers or accumulated batches. With `Trainer(max_steps=...)` alone one Lightning "epoch"
    is the whole fit; with `max_epochs` it is one pass over the data.

    Args:
        batch_size: Samples a batch and process.
        seed: Fixes the order of samples.
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
                raise ValueError(f"{name} is {value!r}. Give a whole number, {least} or more.")
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self._restored = {"num_batches": 0, "num_draws": 0}

    @abstractmethod
    def train_set(self) -> Dataset:
        """The training samples: a map-style dataset of ``(x (C, H, W), y ())``.

        One with ``takes_draws = True`` is asked for ``(draw, index)`` instead of the index: draw is the sample's place in the stream, what
        is random about it should depend on that and the seed alone.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (N, C, H, W) to images (N, channels, height, width), uint8."""

    @abstractmethod
    def reference_images(self) -> tuple[Tensor, Tensor]:
        """Real images in the form that `decode` gives, and their labels (N,): what samples are held against."""

    def samples_sha256(self) -> str | None:
        """A checksum of the training samples, by which a run notices that they were replaced; None: that is not noticed."""
        return None

    def decoder_sha256(self) -> str | None:
        """A checksum of what `decode` uses; None: there is nothing that could be replaced, or that is not noticed."""
        return None

    @property
    def classes(self) -> list[int] | None:
        """Labels that the training samples have, ascending; None: all that the model knows."""
        return None

    def reference_classes(self, *, num_classes: int) -> list[int] | None:
        """Labels that `reference_images` have, ascending; None: all `num_classes` that the model knows.

        Raises:
            ValueError: when it is not certain that they are the model's.
        """
        return self.reference_images()[1].unique().tolist()

    def check_fits(self, denoiser: nn.Module) -> None:
        """Find out whether `denoiser` can be trained on these latents, before anything is.

        Raises:
            ValueError: when its latents have another size or channel count, or it has no place for a label.
        """
        self.check_latents(denoiser)
        self.check_labels(denoiser.num_classes)

    def check_labels(self, num_classes: int) -> None:
        """Find out whether labels are those of a model with `num_classes` classes; ValueError when they are not, a warning when they may
        be others.
        """
        if (
            self.classes is not None
            and self.classes
            and not 0 <= min(self.classes) <= max(self.classes) < num_classes
        ):
            raise ValueError(
                f"The data has labels {min(self.classes)} to {max(self.classes)}, but the model knows the classes 0 to "
                f"{num_classes - 1}. Give a model of these classes, or data of its classes."
            )

    def check_latents(self, denoiser: nn.Module) -> None:
        """Find out whether `denoiser` works on latents of this size and channel count; ValueError when it does not."""
        config = getattr(denoiser, "config", {})
        side = config.get("input_size")
        expected = getattr(denoiser, "latent_shape", None) or (
            side and (config.get("in_channels"), side, side)
        )
        if expected and tuple(expected) != tuple(self.latent_shape):
            raise ValueError(
                f"The data's latents are (C, H, W) = {tuple(self.latent_shape)}, the model takes {tuple(expected)}. Give "
                "latents of that size and channel count, or a model for these."
            )

    def check_processes(self, num_processes: int) -> None:
        """Find out whether so many processes can train; ValueError when there is no sample for each."""
        if num_processes > (num_samples := len(self.train_set())):
            raise ValueError(
                f"There are {num_processes} processes, but only {num_samples} training samples. Give fewer devices."
            )

    def check_decode(self) -> None:
        """Find out whether `decode` will work; ValueError or ArtifactError when it will not."""

    def train_dataloader(self) -> StreamLoader:
        if self.trainer is not None and (overfit_batches := self.trainer.overfit_batches):
            raise ValueError(
                f"Trainer(overfit_batches={overfit_batches}) would put an order of its own in place of this one, which "
                "can be resumed. Leave it out; max_steps and limit_train_batches shorten a run."
            )
        dataset = self.train_set()
        ranks = self._ranks
        self.check_processes(ranks["num_replicas"])
        sampler = StreamSampler(
            len(dataset),
            num_draws=self.batch_size * self._batches_per_pass(len(dataset)),
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
            # without one of its own the loader would draw its workers' seeds from the generator of the training noise
            generator=torch.Generator().manual_seed(self.seed + ranks["rank"]),
        )

    def setup(self, stage: str) -> None:
        self._restored = {
            "num_batches": 0,
            "num_draws": 0,
        }  # an earlier fit's; Lightning restores this one's after setup

    def state_dict(self) -> dict[str, int]:
        """Position in the stream: batches that each process has trained on, and samples of all processes together."""
        return {"num_batches": self._num_batches(), "num_draws": self._num_draws()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
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
        # `processed` counts a batch from the end of its training step on: before callbacks save their checkpoints, and
        # never for a step that was cut short. Lightning restores it later than this object's state: hence the larger.
        trained = (
            0
            if self.trainer is None
            else self.trainer.fit_loop.epoch_loop.batch_progress.total.processed
        )
        return max(self._restored["num_batches"], trained)

    def _num_draws(self) -> int:
        since = self._num_batches() - self._restored["num_batches"]
        return self._restored["num_draws"] + since * self.batch_size * self._ranks["num_replicas"]
