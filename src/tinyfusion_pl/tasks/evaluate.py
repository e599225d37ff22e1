"""Stage 3: sample from teacher, pruned and recovered model, with the same noise and labels, and measure quality and speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from tinyfusion_pl.artifacts import save_tensors, sha256, tensors_sha256, write_json
from tinyfusion_pl.checksums import Origin, content_sha256, model_sha256
from tinyfusion_pl.metrics import GenerationMetrics, Reference, read_reference
from tinyfusion_pl.metrics.reference import write_images
from tinyfusion_pl.models.records import TRAINING_IMAGES
from tinyfusion_pl.modules import Generation
from tinyfusion_pl.objectives import ImageSampler, get_labels
from tinyfusion_pl.report import write_grid
from tinyfusion_pl.tasks.closeness import closeness
from tinyfusion_pl.tasks.fitting import num_processes
from tinyfusion_pl.tasks.folder import Inputs, RunFolder, say
from tinyfusion_pl.tasks.interruption import interruptible
from tinyfusion_pl.tasks.kept import KeptBatches
from tinyfusion_pl.tasks.measured_models import load_model, own_models
from tinyfusion_pl.tasks.origins import check_own_models, files_left
from tinyfusion_pl.tasks.results import (
    METRICS,
    describe,
    gathered,
    get_mark,
    is_whole,
    kept_result,
    plain,
)
from tinyfusion_pl.tasks.shared_reference import set_shared_reference
from tinyfusion_pl.tasks.shared_results import SharedResults
from tinyfusion_pl.tasks.timing import images_per_second, on_device
from tinyfusion_pl.tasks.trainer_checks import check_sampling_trainer

ROLES = ("teacher", "pruned", "recovered")
TAKEN = (
    *ROLES, "labels", "name", "reference", "seconds", "block_runs", "training_images", "shared", "speedup", "peak_memory_mib", "protocol",
)  # fmt: skip
"""Keys of ``metrics.json`` and of ``samples.safetensors`` that no model of one's own can have for a name."""
SAMPLES = "samples.safetensors"


@dataclass(kw_only=True)
class Evaluate:
    """Evaluation of the run's models, or of others.

    Args:
        trainer: Makes a Trainer from ``default_root_dir=``.
        metrics: Measures images.
        models: Name -> a shallow or diffusers folder, a published name, or a checkpoint of the configured model, whatever its depth:
            these are measured instead of the run's own.
        reference: Reference file (see `read_reference`); None: the data module's images.
        sampling: Arguments of ``objective.sample``; those not given are its defaults, and not in the protocol.
        labels: ``"balanced"`` or ``"random"``.
        precision, compile: Of the denoiser while it samples, see `ImageSampler`.
        num_samples: Images measured for each model, >= 2: exactly so many, whatever the devices.
        batch_size: Images sampled at once on each device, >= 1.
        num_shown: Images of each model kept for the report.
        num_timing_rounds: Batches of each model timed in turn for images/s, >= 0; 0: speed is not measured.
        sampled: Of the run's own models (`ROLES`), those that samples are taken from; of others depth and distance alone are measured.
        num_draws: Fixed draws of the training data on which the loss and the distance to the teacher's output are taken, >= 0; 0: none.
        shared: Results of other runs: a model that was measured there in the same way is not measured again.
        write_npz: Leave ``samples_<model>.npz`` as the ADM evaluator takes it.
        write_grid: Leave ``samples_<model>.png``, the images shown.
    """

    trainer: Callable[..., Trainer]
    metrics: GenerationMetrics
    models: Mapping[str, str | None] = field(default_factory=dict)
    reference: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    labels: str = "balanced"
    precision: str = "float32"
    compile: bool = False
    num_samples: int = 1000
    batch_size: int = 128
    num_shown: int = 40
    num_timing_rounds: int = 3
    sampled: Sequence[str] = ROLES
    num_draws: int = 0
    shared: SharedResults = field(default_factory=SharedResults)
    write_npz: bool = False
    write_grid: bool = False

    def __post_init__(self) -> None:
        for name, least in {
            "num_samples": 2,
            "batch_size": 1,
            "num_shown": 0,
            "num_timing_rounds": 0,
            "num_draws": 0,
        }.items():
            if getattr(self, name) < least:
                raise ValueError(
                    f"evaluate.{name} is {getattr(self, name)}; give a count >= {least}."
                )
        if self.num_shown > self.num_samples:
            raise ValueError(
                f"evaluate.num_shown={self.num_shown} is more than num_samples={self.num_samples}."
            )
        if (wrong := [role for role in self.sampled if role not in ROLES]) or not self.sampled:
            raise ValueError(
                f"evaluate.sampled is {wrong or []}; give one or more of {', '.join(ROLES)}."
            )
        self.models = {name: path for name, path in self.models.items() if path is not None}
        if wrong := [name for name in self.models if not name.isidentifier()]:
            raise ValueError(
                f"evaluate.models.{wrong[0]}: {wrong} are no names; give letters, digits and underscores, they "
                "become file names."
            )
        if wrong := [name for name in self.models if name in TAKEN]:
            raise ValueError(
                f"evaluate.models.{wrong[0]}: the name {wrong[0]!r} is taken in metrics.json. Give another one; taken are "
                f"{', '.join(TAKEN)}."
            )
        self.held = False  # whether the metrics have the reference

    def check(self, inputs: Inputs) -> None:
        """Find out whether the settings hold, the models load and the data can be evaluated, before anything is trained.

        Raises:
            ValueError, ArtifactError: when they do not.
        """
        self.sampler(inputs.teacher, inputs).check()
        inputs.data.check_decode()
        self.check_classes(inputs)
        check_sampling_trainer("evaluate.trainer", self.trainer)
        reference = self.get_reference(inputs)
        self.metrics.check(num_samples=self.num_samples, num_reference=reference.num_images)
        self.metrics.check_reference(reference)
        for path in self.models.values():
            load_model(path, inputs)

    def num_processes(self) -> int:
        """Processes that it runs on."""
        return num_processes(self.trainer())

    def run(self, folder: RunFolder, inputs: Inputs) -> None:
        """Measure the models; each one's numbers are kept as soon as they are there, and each batch until they are."""
        if not self.models:
            check_own_models(folder, inputs)
        models, protocol = self.get_models(folder, inputs), self.protocol(inputs)
        origins = {
            role: self.made_from(model, folder, inputs, role=role, protocol=protocol)
            for role, model in models.items()
        }
        before = {
            role: self.shared.own(kept_result(folder, role, origin))
            for role, origin in origins.items()
        }
        if None not in before.values() and is_whole(folder, [*models]):
            say(f"evaluate: done before; numbers in {folder / METRICS}")
            return
        sampled = [role for role in models if self.is_sampled(role)]
        if not sampled:
            raise ValueError(
                f"evaluate.sampled is {list(self.sampled)}, but there are {', '.join(models)} to measure. Add one of them."
            )
        say(
            f"evaluate: {self.num_samples} samples each of {', '.join(sampled)}; numbers go to {folder / METRICS}"
        )
        samplers = {role: self.sampler(model, inputs) for role, model in models.items()}
        for role, sampler in samplers.items():
            if before[role] is None:
                folder.finish(
                    get_mark(role),
                    self.shared_or_measured(
                        sampler, folder, inputs, role=role, made_from=origins[role]
                    ),
                )
        samplers = {role: sampler for role, sampler in samplers.items() if self.is_sampled(role)}
        results = self.write(
            folder,
            inputs,
            models=models,
            speed=self.speed(samplers, inputs),
            shown=self.shown(samplers, inputs),
            protocol=protocol,
        )
        left = [
            METRICS,
            SAMPLES,
            *([f"samples_{role}.png" for role in samplers] if self.write_grid else []),
        ]
        folder.finish(
            "evaluate",
            {
                "seconds": sum(folder.result(get_mark(role))["seconds"] for role in models),
                "models": [*models],
                "results": results,
                "files": files_left(folder.path, left),
            },
        )

    def shared_or_measured(
        self,
        sampler: ImageSampler,
        folder: RunFolder,
        inputs: Inputs,
        *,
        role: str,
        made_from: Origin,
    ) -> dict[str, Any]:
        """What is known of a model: as another run measured it, where one did; else measured now."""
        if not self.write_npz and (found := self.shared.find(made_from)) is not None:
            say(
                f"evaluate: {role} was measured in {found['run_dir']}, which saves {found['seconds']:.0f} s "
                "(evaluate.shared.reuse=false measures it again)"
            )
            return {**found, "made_from": made_from}
        say(f"evaluate: {role}")
        results, seconds = {}, 0.0
        if self.is_sampled(role):
            results, seconds = self.measure(sampler, folder, inputs, role=role, made_from=made_from)
        if self.num_draws:
            results |= closeness(sampler.denoiser, inputs, self.num_draws, device=self.device)
        result = {**describe(sampler.denoiser), **results, "seconds": seconds}
        self.shared.keep(made_from, result, run_dir=folder.path)
        return {
            **result,
            "made_from": made_from,
            "files": files_left(folder.path, [f"samples_{role}.npz"] * self.write_npz),
        }

    def is_sampled(self, role: str) -> bool:
        return bool(self.models) or role in self.sampled

    def made_from(
        self,
        model: nn.Module,
        folder: RunFolder,
        inputs: Inputs,
        *,
        role: str,
        protocol: dict[str, Any],
    ) -> Origin:
        """What decides the numbers of `model`: its weights, what they are held against and how, the configuration."""
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
        """What decides loss and distance to the teacher."""
        if not self.num_draws:
            return None
        return content_sha256(
            [self.num_draws, model_sha256(inputs.teacher), inputs.data.samples_sha256()]
        )

    def get_models(self, folder: RunFolder, inputs: Inputs) -> dict[str, nn.Module]:
        """Name -> model: those given, or the run's own as far as they are there."""
        return {name: load_model(path, inputs) for name, path in self.models.items()} or own_models(
            folder, inputs
        )

    def sampler(self, model: nn.Module, inputs: Inputs) -> ImageSampler:
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
        """What it holds, and its checksum when it was read."""
        return read_reference(self.reference), sha256(self.reference)

    def measure(
        self,
        sampler: ImageSampler,
        folder: RunFolder,
        inputs: Inputs,
        *,
        role: str,
        made_from: Origin,
    ) -> tuple[dict[str, float], float]:
        """Sample, and hold the images against the reference, resuming from the batches that an interrupted measurement kept, where they
        are `made_from` the same.

        Returns the metrics' results and the seconds that it took this time.
        """
        start = time.monotonic()
        trainer = self.trainer(default_root_dir=folder.path)
        if not self.held:
            self.metrics.to(trainer.strategy.root_device)
            set_shared_reference(
                self.metrics,
                self.get_reference(inputs),
                self.shared.folder if self.shared.reuse else None,
                made_from,
                rank=trainer.global_rank,
                world_size=trainer.world_size,
                batch_size=self.batch_size,
            )
            self.held = True
        kept = KeptBatches(folder / "evaluate" / role, images=self.write_npz, made_from=made_from)
        shell = Generation(
            sampler,
            labels=self.get_labels(sampler, inputs),
            metrics=self.metrics,
            batch_size=self.batch_size,
            measured=kept,
        )
        with interruptible(trainer):
            trainer.test(shell, verbose=False)
        if self.write_npz:
            self.write_samples(folder / f"samples_{role}.npz", kept)
        trainer.strategy.barrier("before the kept batches are deleted")
        kept.delete()
        return shell.results, time.monotonic() - start

    @rank_zero_only
    def write_samples(self, path: Path, kept: KeptBatches) -> None:
        write_images(path, kept.numbered_images(), num_images=self.num_samples)

    def get_labels(self, sampler: ImageSampler, inputs: Inputs) -> torch.Tensor:
        num_classes = sampler.denoiser.num_classes
        return get_labels(
            self.labels,
            self.num_samples,
            num_classes,
            seed=inputs.seed,
            classes=self.classes(inputs, num_classes),
        )

    def classes(self, inputs: Inputs, num_classes: int) -> list[int] | None:
        """Classes that samples are asked to be: those of the images that they are held against; with a reference file, which does not say
        them, those of the training data. None: all that the model knows.
        """
        if self.reference is None:
            return inputs.data.reference_classes(num_classes=num_classes)
        inputs.data.check_labels(num_classes)
        return inputs.data.classes

    def check_classes(self, inputs: Inputs) -> None:
        """Find out whether the model knows the data's classes, and say where they are fewer."""
        num_classes = inputs.teacher.num_classes
        classes = self.classes(inputs, num_classes)
        get_labels(self.labels, self.num_samples, num_classes, seed=inputs.seed, classes=classes)
        if classes is not None and len(classes) < num_classes:
            beside = (
                ""
                if self.reference is None
                else f"; those of {self.reference} are not known, and should be the same"
            )
            say(
                f"evaluate: samples are of the data's {len(classes)} classes, of {num_classes} that the model knows{beside}"
            )

    def shown(self, samplers: dict[str, ImageSampler], inputs: Inputs) -> dict[str, torch.Tensor]:
        indices = torch.arange(self.num_shown)
        labels = self.get_labels(next(iter(samplers.values())), inputs)[: self.num_shown]
        return {
            "labels": labels,
            **{
                role: sampler(indices, labels, device=on_device(sampler, self.device)).cpu()
                for role, sampler in samplers.items()
                if self.num_shown
            },
        }

    def speed(self, samplers: dict[str, ImageSampler], inputs: Inputs) -> dict[str, float]:
        size = min(self.batch_size, self.num_samples)
        labels = self.get_labels(next(iter(samplers.values())), inputs)[:size]
        return images_per_second(
            samplers, labels, num_rounds=self.num_timing_rounds, device=self.device
        )

    @cached_property
    def device(self) -> torch.device:
        """Where this process samples."""
        return self.trainer().strategy.root_device

    @rank_zero_only
    def write(
        self,
        folder: RunFolder,
        inputs: Inputs,
        *,
        models: dict[str, nn.Module],
        speed: dict[str, float],
        shown: dict[str, torch.Tensor],
        protocol: dict[str, Any],
    ) -> dict[str, Any]:
        """Write ``metrics.json``, whose content is returned, and the images shown."""
        save_tensors(folder / SAMPLES, shown)
        if self.write_grid:
            for role in shown.keys() - {"labels"}:
                write_grid(folder / f"samples_{role}.png", shown[role])
        results: dict[str, Any] = {
            "name": inputs.name,
            "reference": self.reference or type(inputs.data).__name__,
        }
        results |= gathered(
            folder, list(models), speed, getattr(inputs.teacher, "source", {}).get(TRAINING_IMAGES)
        )
        results["protocol"] = protocol
        write_json(folder / METRICS, results)
        return results

    def protocol(self, inputs: Inputs) -> dict[str, Any]:
        """What two results must share to be comparable."""
        reference = self.get_reference(inputs)
        digest = (
            tensors_sha256({"pictures": reference.images})
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
        """For the protocol: the classes, where they are not all that the model knows."""
        classes = self.classes(inputs, inputs.teacher.num_classes)
        return (
            {}
            if classes is None or len(classes) == inputs.teacher.num_classes
            else {"classes": classes}
        )
