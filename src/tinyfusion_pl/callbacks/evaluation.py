"""Sampling and measuring during training."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor

from tinyfusion_pl.artifacts import tensors_sha256
from tinyfusion_pl.metrics import GenerationMetrics
from tinyfusion_pl.objectives import ImageSampler, get_labels
from tinyfusion_pl.report import write_grid


class EvaluationCallback(Callback):
    """Every so many optimizer steps: samples from the averaged weights, logs ``val/<metric>`` and a grid of images.

    The averaged weights are those of the Trainer's weight averaging callback; without one the weights are the raw ones. Images of the
    same number have the same noise at every step. No random generator of the training moves.

    Numbers of few samples are larger than those of many (FID) and compare with each other alone.

    Args:
        metrics: Measures images against the data module's ``reference_images()``.
        every_n_steps: Optimizer steps between evaluations, >= 1.
        sampling: Arguments of ``objective.sample``.
        num_samples: Images of an evaluation, over all processes, >= 2.
        batch_size: Images sampled at once on each process.
        num_shown: Images of the grid, the first ones; 0: no grid.
        labels: ``"balanced"`` or ``"random"``.
        seed: Of noise and labels.
        precision: Of the denoiser, see `ImageSampler`.

    The LightningModule has ``denoiser`` and ``objective`` (`MaskLearning`, `Recovery`, `Denoising` do), the data module ``latent_shape``,
    ``decode`` and ``reference_images``. The grid goes to W&B or TensorBoard where one of them logs, and to ``samples/<step>.png`` in the
    Trainer's folder. What the numbers can be compared by, `protocol`, goes to the loggers' hyperparameters as ``val/protocol``.
    """

    def __init__(
        self,
        metrics: GenerationMetrics,
        *,
        every_n_steps: int,
        sampling: dict[str, Any] | None = None,
        num_samples: int = 500,
        batch_size: int = 100,
        num_shown: int = 40,
        labels: str = "balanced",
        seed: int = 0,
        precision: str = "float32",
    ) -> None:
        for name, value, least in (
            ("every_n_steps", every_n_steps, 1),
            ("num_samples", num_samples, 2),
            ("batch_size", batch_size, 1),
            ("num_shown", num_shown, 0),
        ):
            if value < least:
                raise ValueError(f"EvaluationCallback: {name} is {value}; give at least {least}.")
        self.metrics, self.every_n_steps, self.sampling = (
            metrics,
            every_n_steps,
            dict(sampling or {}),
        )
        self.num_samples, self.batch_size, self.num_shown = (
            num_samples,
            batch_size,
            min(num_shown, num_samples),
        )
        self.labels, self.seed, self.precision = labels, seed, precision
        self.results: dict[int, dict[str, float]] = {}  # by step
        self.protocol: dict[str, Any] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for owner, names, kind in (
            (pl_module, ("denoiser", "objective"), "LightningModule"),
            (trainer.datamodule, ("latent_shape", "decode", "reference_images"), "data module"),
        ):
            if lacking := [name for name in names if not hasattr(owner, name)]:
                raise ValueError(
                    f"EvaluationCallback: the {kind} {type(owner).__name__} has no {', '.join(lacking)}."
                )
        sampler = self._sampler(trainer, pl_module)
        sampler.check()
        self._get_labels(trainer, sampler)
        images = trainer.datamodule.reference_images()[0]
        self.metrics.check(num_samples=self.num_samples, num_reference=len(images))
        averaging = any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)
        self.protocol = self.metrics.protocol(
            weights="averaged" if averaging else "raw",
            num_samples=self.num_samples,
            num_reference=len(images),
            reference_sha256=tensors_sha256({"pictures": images}),
            labels=self.labels,
            seed=self.seed,
            **self.sampling,
            precision=self.precision,
        )
        for logger in trainer.loggers:
            logger.log_hyperparams({"val/protocol": self.protocol})
        self.metrics.to(pl_module.device).reset(reference=True)
        for batch in images[trainer.global_rank :: trainer.world_size].split(self.batch_size):
            self.metrics.update_reference(batch)
        self._last = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        step = trainer.global_step  # stays where it was while gradients accumulate
        if step == self._last or step % self.every_n_steps:
            return
        self._last = step
        with self._averaged(trainer, pl_module):
            self.evaluate(trainer, pl_module, step)

    def evaluate(self, trainer: Trainer, pl_module: LightningModule, step: int) -> dict[str, float]:
        """Sample, measure and log at `step`; every process takes part. Returns the metrics' results."""
        sampler = self._sampler(trainer, pl_module)
        labels = self._get_labels(trainer, sampler)
        self.metrics.reset()
        for indices in torch.arange(
            trainer.global_rank, self.num_samples, trainer.world_size
        ).split(self.batch_size):
            self.metrics.update(
                sampler(indices, labels[indices], device=pl_module.device),
                labels[indices],
                indices=indices,
            )
        results = self.metrics.compute()
        self.results[step] = results
        for logger in trainer.loggers:
            logger.log_metrics({f"val/{name}": value for name, value in results.items()}, step=step)
        if self.num_shown and trainer.is_global_zero:
            shown = torch.arange(self.num_shown)
            self._show(trainer, sampler(shown, labels[shown], device=pl_module.device), step)
        return results

    def _show(self, trainer: Trainer, images: Tensor, step: int) -> None:
        path = Path(trainer.default_root_dir) / "samples" / f"{step:08d}.png"
        write_grid(path, images)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("val/samples", [str(path)], step=step)
            elif isinstance(logger, TensorBoardLogger):
                from torchvision.io import read_image

                logger.experiment.add_image("val/samples", read_image(str(path)), step)

    def _get_labels(self, trainer: Trainer, sampler: ImageSampler) -> Tensor:
        """Labels of the samples, among the classes of the images that they are held against."""
        num_classes, data = sampler.denoiser.num_classes, trainer.datamodule
        classes = (
            data.reference_classes(num_classes=num_classes)
            if hasattr(data, "reference_classes")
            else None
        )
        return get_labels(
            self.labels, self.num_samples, num_classes, seed=self.seed, classes=classes
        )

    def _sampler(self, trainer: Trainer, pl_module: LightningModule) -> ImageSampler:
        data = trainer.datamodule
        return ImageSampler(
            denoiser=pl_module.denoiser,
            objective=pl_module.objective,
            latent_shape=data.latent_shape,
            decode=data.decode,
            sampling=self.sampling,
            seed=self.seed,
            precision=self.precision,
        )

    def _averaged(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        averaging = next(
            (callback for callback in trainer.callbacks if isinstance(callback, WeightAveraging)),
            None,
        )
        return nullcontext() if averaging is None else _Swapped(averaging, pl_module)


class _Swapped:
    """The module with its averaged weights for a while, by the averaging callback's own exchange."""

    def __init__(self, averaging: WeightAveraging, pl_module: LightningModule) -> None:
        self.averaging, self.pl_module = averaging, pl_module

    def __enter__(self) -> None:
        self.averaging._swap_models(self.pl_module)

    def __exit__(self, *_: Any) -> None:
        self.averaging._swap_models(self.pl_module)
