"""Samples and measures images during training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor, nn

from tinyfusion_pl.artifacts import tensors_sha256
from tinyfusion_pl.callbacks.trainer_access import get_callbacks, get_datamodule
from tinyfusion_pl.metrics import GenerationMetrics
from tinyfusion_pl.objectives import ImageSampler, Objective, get_labels
from tinyfusion_pl.report import write_grid


class EvaluationCallback(Callback):
    """Samples images every `every_n_steps`, logs ``val/<metric>`` and a grid of images.

    Images come from the averaged weights of the Trainer's weight averaging callback, or from the
    raw weights without one. Each sample has the same noise at every step. The random generators of
    the training do not change.

    FID is biased upward for few samples: compare values only at equal `num_samples`.

    Args:
        metrics: Compare images with the data module's ``reference_images()``.
        every_n_steps: Number of optimizer steps between evaluations, >= 1.
        sampling: Keyword arguments of ``objective.sample``.
        num_samples: Number of images of an evaluation over all processes, >= 2.
        batch_size: Number of images that a process samples at once.
        num_shown: Number of images in the grid; 0 draws no grid.
        labels: ``"balanced"`` or ``"random"``.
        seed: Seed of noise and labels.
        precision: Precision of the denoiser, see `ImageSampler`.

    The LightningModule needs ``denoiser`` and ``objective`` (as in `MaskLearning`, `Recovery` and
    `Denoising`), the data module ``latent_shape``, ``decode`` and ``reference_images``. The grid is
    saved as ``samples/<step>.png`` in the Trainer's root folder and logged to W&B and TensorBoard.
    The evaluation `protocol` is logged as the hyperparameter ``val/protocol``.
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
        self.metrics, self.every_n_steps = metrics, every_n_steps
        self.sampling = dict(sampling or {})
        self.num_samples, self.batch_size = num_samples, batch_size
        self.num_shown = min(num_shown, num_samples)
        self.labels, self.seed, self.precision = labels, seed, precision
        self.results: dict[int, dict[str, float]] = {}  # by step
        self.protocol: dict[str, Any] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check sampling, labels and metrics, log the protocol, accumulate the reference."""
        data = get_datamodule(trainer)
        for owner, names, kind in (
            (pl_module, ("denoiser", "objective"), "LightningModule"),
            (data, ("latent_shape", "decode", "reference_images"), "data module"),
        ):
            if lacking := [name for name in names if not hasattr(owner, name)]:
                raise ValueError(
                    f"EvaluationCallback: the {kind} {type(owner).__name__} has no "
                    f"{', '.join(lacking)}."
                )
        sampler = self._sampler(trainer, pl_module)
        sampler.check()
        self._get_labels(trainer, sampler)
        images = data.reference_images()[0]
        self.metrics.check(num_samples=self.num_samples, num_reference=len(images))
        self.protocol = self.metrics.protocol(
            weights="raw" if _find_averaging(trainer) is None else "averaged",
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
        """Evaluate if an evaluation is due."""
        step = trainer.global_step  # does not change while gradients accumulate
        if step == self._last or step % self.every_n_steps:
            return
        self._last = step
        with _averaged(trainer, pl_module):
            self.evaluate(trainer, pl_module, step)

    def evaluate(self, trainer: Trainer, pl_module: LightningModule, step: int) -> dict[str, float]:
        """Sample, measure and log at `step`, on all processes; returns the metric values."""
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
        """Labels of the samples, among the classes of the reference images."""
        num_classes, data = cast(int, sampler.denoiser.num_classes), get_datamodule(trainer)
        classes = (
            data.reference_classes(num_classes=num_classes)
            if hasattr(data, "reference_classes")
            else None
        )
        return get_labels(
            self.labels, self.num_samples, num_classes, seed=self.seed, classes=classes
        )

    def _sampler(self, trainer: Trainer, pl_module: LightningModule) -> ImageSampler:
        data = get_datamodule(trainer)
        return ImageSampler(
            denoiser=cast(nn.Module, pl_module.denoiser),
            objective=cast(Objective, pl_module.objective),
            latent_shape=data.latent_shape,
            decode=data.decode,
            sampling=self.sampling,
            seed=self.seed,
            precision=self.precision,
        )


def _find_averaging(trainer: Trainer) -> WeightAveraging | None:
    """The first weight averaging callback; None without one."""
    return next((c for c in get_callbacks(trainer) if isinstance(c, WeightAveraging)), None)


@contextmanager
def _averaged(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Give `pl_module` its averaged weights, if there are any."""
    averaging = _find_averaging(trainer)
    if averaging is not None:
        averaging._swap_models(pl_module)
    try:
        yield
    finally:
        if averaging is not None:
            averaging._swap_models(pl_module)
