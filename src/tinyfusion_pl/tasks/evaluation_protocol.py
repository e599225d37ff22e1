"""What an evaluation compares samples with, and what two results must share to be comparable."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tinyfusion_pl.artifacts import sha256, tensors_sha256
from tinyfusion_pl.checksums import Origin, content_sha256, model_sha256
from tinyfusion_pl.metrics import GenerationMetrics, Reference, read_reference
from tinyfusion_pl.objectives import ImageSampler, get_labels
from tinyfusion_pl.tasks.folder import Inputs, RunFolder, say
from tinyfusion_pl.tasks.measured_models import load_model, own_models
from tinyfusion_pl.tasks.results import plain


class EvaluationProtocol:
    """Mixin of `Evaluate`: models, samplers, reference, labels, and the protocol of its results."""

    metrics: GenerationMetrics
    models: Mapping[str, Any]
    reference: str | None
    sampling: dict[str, Any]
    labels: str
    precision: str
    compile: bool
    num_samples: int
    num_draws: int

    def is_sampled(self, role: str) -> bool:
        """Whether samples are drawn from the model `role`."""
        raise NotImplementedError

    def get_models(self, folder: RunFolder, inputs: Inputs) -> dict[str, nn.Module]:
        """Name -> model: those of `models`, or the run's own that exist."""
        return {name: load_model(path, inputs) for name, path in self.models.items()} or own_models(
            folder, inputs
        )

    def sampler(self, model: nn.Module, inputs: Inputs) -> ImageSampler:
        """The sampler of `model` with the settings of this evaluation."""
        return ImageSampler(
            denoiser=model.eval(),
            objective=inputs.objective,
            latent_shape=inputs.data.latent_shape,
            decode=inputs.data.decode,
            sampling=self.sampling,
            seed=inputs.seed,
            precision=self.precision,
            compile=self.compile,
        )

    def get_reference(self, inputs: Inputs) -> Reference:
        """The reference file, or the data module's images."""
        if self.reference is not None:
            return self._reference_file[0]
        images = inputs.data.reference_images()[0]
        return Reference(path=Path("data"), images=images, num_images=len(images))

    @cached_property
    def _reference_file(self) -> tuple[Reference, str]:
        """The content of the reference file, and its checksum when it was read."""
        assert self.reference is not None
        return read_reference(self.reference), sha256(self.reference)

    def get_labels(self, sampler: ImageSampler, inputs: Inputs) -> torch.Tensor:
        """The label of each sample (num_samples,)."""
        num_classes = sampler.denoiser.num_classes
        return get_labels(
            self.labels,
            self.num_samples,
            num_classes,
            seed=inputs.seed,
            classes=self.classes(inputs, num_classes),
        )

    def classes(self, inputs: Inputs, num_classes: int) -> list[int] | None:
        """The classes to sample from; None: all classes of the model.

        These are the classes of the reference images. A reference file does not contain classes:
        with one, they are those of the training data.
        """
        if self.reference is None:
            return inputs.data.reference_classes(num_classes=num_classes)
        inputs.data.check_labels(num_classes)
        return inputs.data.classes

    def check_classes(self, inputs: Inputs) -> None:
        """Check that the model has the data's classes, and report if the data have fewer."""
        num_classes = inputs.teacher.num_classes
        classes = self.classes(inputs, num_classes)
        get_labels(self.labels, self.num_samples, num_classes, seed=inputs.seed, classes=classes)
        if classes is not None and len(classes) < num_classes:
            unknown = (
                ""
                if self.reference is None
                else f"; the classes of {self.reference} are unknown and should be the same"
            )
            say(
                f"evaluate: sampling from the data's {len(classes)} classes, of {num_classes} that "
                f"the model knows{unknown}"
            )

    def protocol(self, inputs: Inputs) -> dict[str, Any]:
        """What two results must share to be comparable."""
        reference = self.get_reference(inputs)
        digest = (
            tensors_sha256({"pictures": reference.images})  # the key is part of published checksums
            if self.reference is None
            else self._reference_file[1]
        )
        return self.metrics.protocol(
            num_samples=self.num_samples,
            num_reference=reference.num_images,
            reference_sha256=digest,
            labels=self.labels,
            **self._classes_sampled(inputs),
            seed=inputs.seed,
            **plain(self.sampling),
            precision=self.precision,
        )

    def _classes_sampled(self, inputs: Inputs) -> dict[str, Any]:
        """The classes, for the protocol, if they are not all classes of the model."""
        classes = self.classes(inputs, inputs.teacher.num_classes)
        is_all = classes is None or len(classes) == inputs.teacher.num_classes
        return {} if is_all else {"classes": classes}

    def made_from(
        self,
        model: nn.Module,
        folder: RunFolder,
        inputs: Inputs,
        *,
        role: str,
        protocol: Mapping[str, Any],
    ) -> Origin:
        """What determines the metrics of `model`: weights, reference, protocol, configuration."""
        parts = {
            "weights": model_sha256(model),
            "reference": protocol["reference_sha256"],
            "feature network": protocol["feature_network"],
            "sampled": None if self.is_sampled(role) else "no",
            "draws": self._draws_sha256(inputs),
            "decoder": inputs.data.decoder_sha256(),
            "protocol": content_sha256(protocol),
            "configuration": folder.configuration,
        }
        return {name: checksum for name, checksum in parts.items() if checksum is not None}

    def _draws_sha256(self, inputs: Inputs) -> str | None:
        """What determines the loss and the distance to the teacher; None without draws."""
        if not self.num_draws:
            return None
        return content_sha256(
            [self.num_draws, model_sha256(inputs.teacher), inputs.data.samples_sha256()]
        )
