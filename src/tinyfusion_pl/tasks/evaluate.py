"""Stage 3: sample from the teacher, the pruned and the recovered model, and measure them.

All models get the same noise and labels.
"""

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

from tinyfusion_pl.checksums import Origin
from tinyfusion_pl.metrics import GenerationMetrics
from tinyfusion_pl.metrics.reference import write_images
from tinyfusion_pl.modules import Generation
from tinyfusion_pl.objectives import ImageSampler
from tinyfusion_pl.tasks.closeness import closeness
from tinyfusion_pl.tasks.evaluation_outputs import SAMPLES, draw_shown, write_outputs
from tinyfusion_pl.tasks.evaluation_protocol import EvaluationProtocol
from tinyfusion_pl.tasks.evaluation_settings import LEAST, ROLES, check_counts, check_names
from tinyfusion_pl.tasks.fitting import num_processes
from tinyfusion_pl.tasks.folder import Inputs, RunFolder, say
from tinyfusion_pl.tasks.interruption import interruptible
from tinyfusion_pl.tasks.kept import KeptBatches
from tinyfusion_pl.tasks.measured_models import load_model
from tinyfusion_pl.tasks.origins import check_own_models, files_left
from tinyfusion_pl.tasks.results import METRICS, describe, get_mark, is_whole, kept_result
from tinyfusion_pl.tasks.shared_reference import set_shared_reference
from tinyfusion_pl.tasks.shared_results import SharedResults
from tinyfusion_pl.tasks.timing import images_per_second
from tinyfusion_pl.tasks.trainer_checks import check_sampling_trainer


@dataclass(kw_only=True)
class Evaluate(EvaluationProtocol):
    """Evaluation of the run's own models, or of other models.

    Args:
        trainer: Factory of a Trainer, called with ``default_root_dir=``.
        metrics: Metrics of the sampled images.
        models: Name -> model to measure instead of the run's own: a shallow or diffusers folder, a
            published name, or a checkpoint of the configured model with any depth.
        reference: Reference file (see `read_reference`); None: the data module's images.
        sampling: Arguments of ``objective.sample``; those not given keep their defaults and are not
            part of the protocol.
        labels: ``"balanced"`` or ``"random"``.
        precision: Precision of the denoiser while sampling, see `ImageSampler`.
        compile: Whether to compile the denoiser for sampling, see `ImageSampler`.
        num_samples: Exact number of images to measure for each model, over all devices, >= 2.
        batch_size: Images to sample at once on each device, >= 1.
        num_shown: Images of each model to keep for the report.
        num_timing_rounds: Batches of each model to time in turn for images/s, >= 0; 0 disables
            timing.
        sampled: Of the run's own models (`ROLES`), those to sample from; for the others only depth
            and distance are measured.
        num_draws: Fixed draws of the training data for the loss and the distance to the teacher's
            output, >= 0; 0 disables both.
        shared: Results of other runs: a model measured there in the same way is not measured again.
        write_npz: Whether to write ``samples_<model>.npz`` in the format of the ADM evaluator.
        write_grid: Whether to write ``samples_<model>.png`` with the images shown.
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
        self.models = {name: path for name, path in self.models.items() if path is not None}
        counts = {name: getattr(self, name) for name in LEAST}
        check_counts(counts)
        check_names(list(self.models), sampled=self.sampled)
        self.has_reference = False  # whether the metrics have the reference

    def check(self, inputs: Inputs) -> None:
        """Check the settings, the models and the data before anything is trained.

        Raises:
            ValueError: for invalid settings, or data that cannot be evaluated.
            ArtifactError: for a model or a reference that cannot be read.
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
        """The number of processes of this stage."""
        return num_processes(self.trainer())

    def run(self, folder: RunFolder, inputs: Inputs) -> None:
        """Measure the models.

        The results of each model are saved as soon as it is measured, and its batches until then.
        """
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
            say(f"evaluate: already finished; metrics are in {folder / METRICS}")
            return
        sampled = [role for role in models if self.is_sampled(role)]
        if not sampled:
            raise ValueError(
                f"evaluate.sampled is {list(self.sampled)}, but the models to measure are "
                f"{', '.join(models)}. Add one of them."
            )
        say(
            f"evaluate: sampling {self.num_samples:,} images from each of {', '.join(sampled)}; "
            f"metrics will be saved to {folder / METRICS}"
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
        labels = self.get_labels(next(iter(samplers.values())), inputs)
        results = write_outputs(
            folder,
            inputs,
            roles=list(models),
            speed=images_per_second(
                samplers,
                labels[: min(self.batch_size, self.num_samples)],
                num_rounds=self.num_timing_rounds,
                device=self.device,
            ),
            shown=draw_shown(samplers, labels[: self.num_shown], device=self.device),
            reference=self.reference,
            protocol=protocol,
            write_grids=self.write_grid,
        )
        grids = [f"samples_{role}.png" for role in samplers] if self.write_grid else []
        folder.finish(
            "evaluate",
            {
                "seconds": sum(folder.get_result(get_mark(role))["seconds"] for role in models),
                "models": [*models],
                "results": results,
                "files": files_left(folder.path, [METRICS, SAMPLES, *grids]),
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
        """The result of a model, taken from another run or measured now."""
        if not self.write_npz and (found := self.shared.find(made_from)) is not None:
            say(
                f"evaluate: reusing the metrics of {role} from {found['run_dir']}, which saves "
                f"{found['seconds']:.0f} s (evaluate.shared.reuse=false measures it again)"
            )
            return {**found, "made_from": made_from}
        say(f"evaluate: measuring {role}")
        results: dict[str, Any] = {}
        seconds = 0.0
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
        """Whether samples are drawn from the model `role`."""
        return bool(self.models) or role in self.sampled

    def measure(
        self,
        sampler: ImageSampler,
        folder: RunFolder,
        inputs: Inputs,
        *,
        role: str,
        made_from: Origin,
    ) -> tuple[dict[str, float], float]:
        """Sample images and compute the metrics.

        Resumes from the batches of an interrupted evaluation if they have the same origin.

        Returns:
            The metrics, and the seconds that this call took.
        """
        start = time.monotonic()
        trainer = self.trainer(default_root_dir=folder.path)
        if not self.has_reference:
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
            self.has_reference = True
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
        """Write the sampled images as the ADM evaluator reads them."""
        write_images(path, kept.numbered_images(), num_images=self.num_samples)

    @cached_property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.trainer().strategy.root_device
