"""Stage 3: sample from teacher, pruned and recovered model, with the same noise and labels, and measure quality and speed."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tinyfusion_pl.artifacts import save_tensors, write_json
from tinyfusion_pl.models import load_shallow
from tinyfusion_pl.modules import Generation, balanced_labels
from tinyfusion_pl.pruning import find_stacks
from tinyfusion_pl.tasks.fitting import ctrl_c
from tinyfusion_pl.tasks.folder import Inputs, RunFolder, say

ROLES = ("teacher", "pruned", "recovered")


@dataclass(kw_only=True)
class Evaluate:
    """Evaluation of up to three models.

    Args:
        trainer: Makes a Trainer from ``default_root_dir=``.
        metrics: Measures pictures (`GenerationMetrics`).
        sampling: Arguments of ``objective.sample``.
        num_samples: Pictures measured for each model, >= 2; labels are balanced.
        batch_size: Pictures sampled at once, >= 1.
        num_shown: Pictures of each model kept for the report.
        num_timing_rounds: Batches of each model timed in turn for images/s, >= 1.
    """

    trainer: Callable[..., Trainer]
    metrics: nn.Module
    sampling: dict[str, Any] = field(default_factory=dict)
    num_samples: int = 1000
    batch_size: int = 128
    num_shown: int = 40
    num_timing_rounds: int = 3

    def __post_init__(self) -> None:
        for name, least in {"num_samples": 2, "batch_size": 1, "num_shown": 0, "num_timing_rounds": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"evaluate.{name} is {getattr(self, name)}; give a count >= {least}.")
        if self.num_shown > self.num_samples:
            raise ValueError(f"evaluate.num_shown={self.num_shown} is more than num_samples={self.num_samples}.")

    def check(self, inputs: Inputs) -> None:
        """Find out whether the sampling settings hold and the data can be evaluated, before anything is trained.

        Raises:
            ValueError: when they do not.
        """
        inputs.objective.check_sampling(**self.sampling)
        self.trainer()
        inputs.data.reference_pictures()

    def run(self, folder: RunFolder, inputs: Inputs) -> None:
        """Measure the models of a run folder; each one's numbers are kept as soon as they are there."""
        if folder.result("evaluate") is not None:
            say(f"evaluate: done before; numbers in {folder / 'metrics.json'}")
            return
        say(f"evaluate: {self.num_samples} samples each of teacher, pruned and recovered model; numbers go to {folder / 'metrics.json'}")
        models = {"teacher": inputs.teacher}
        for role, path in {"pruned": folder.shallow, "recovered": folder.recovered}.items():
            if path.exists():
                models[role] = load_shallow(path)
        reference = inputs.data.reference_pictures()[0]
        shells = {role: self.generation(model, inputs) for role, model in models.items()}
        for role, shell in shells.items():
            if folder.result(f"evaluate_{role}") is None:
                say(f"evaluate: {role}")
                seconds = self.measure(shell, folder, reference=reference)
                folder.finish(f"evaluate_{role}", {**describe(models[role]), **shell.results, "seconds": seconds})
        self.write(folder, inputs, models=models, speed=self.images_per_second(shells), shown=self.shown(shells))

    def generation(self, model: nn.Module, inputs: Inputs) -> Generation:
        return Generation(model.eval(), objective=inputs.objective, latent_shape=inputs.data.latent_shape, decode=inputs.data.decode,
                          metrics=self.metrics, sampling=self.sampling, seed=inputs.seed)

    def measure(self, shell: Generation, folder: RunFolder, *, reference: torch.Tensor) -> float:
        """Run `shell` over all samples and hold them against the `reference` pictures; its results are then in ``shell.results``.

        Returns seconds.
        """
        start = time.monotonic()
        trainer = self.trainer(default_root_dir=folder.path)
        labels = balanced_labels(self.num_samples, shell.denoiser.num_classes)
        # Every rank takes its own share, of samples and reference: none is padded or counted twice.
        share = slice(trainer.global_rank, None, trainer.world_size)
        mine = TensorDataset(torch.arange(self.num_samples)[share], labels[share])
        self.metrics.reset(reference=True)
        self.metrics.update_reference(reference[share])
        with ctrl_c(trainer):
            trainer.test(shell, DataLoader(mine, batch_size=self.batch_size), verbose=False)
        return time.monotonic() - start

    def shown(self, shells: dict[str, Generation]) -> dict[str, torch.Tensor]:
        indices = torch.arange(self.num_shown)
        labels = balanced_labels(self.num_samples, next(iter(shells.values())).denoiser.num_classes)[: self.num_shown]
        return {"labels": labels, **{role: shell.generate(indices, labels).cpu() for role, shell in shells.items()}}

    def images_per_second(self, shells: dict[str, Generation]) -> dict[str, float]:
        """Images per second of each model, sampled in turn in the same run, so that whatever slows the machine slows all of them."""
        size = min(self.batch_size, self.num_samples)
        indices, labels = torch.arange(size), balanced_labels(size, next(iter(shells.values())).denoiser.num_classes)
        seconds: dict[str, list[float]] = {role: [] for role in shells}
        for _ in range(self.num_timing_rounds):
            for role, shell in shells.items():
                start = time.perf_counter()
                shell.generate(indices, labels).cpu()
                seconds[role].append(time.perf_counter() - start)
        return {role: size / statistics.median(each) for role, each in seconds.items()}

    @rank_zero_only
    def write(self, folder: RunFolder, inputs: Inputs, *, models: dict[str, nn.Module], speed: dict[str, float],
              shown: dict[str, torch.Tensor]) -> None:
        save_tensors(folder / "samples.safetensors", shown)
        results: dict[str, Any] = {"name": inputs.name}
        for role in models:
            result = folder.result(f"evaluate_{role}")
            results[role] = {k: v for k, v in result.items() if k != "seconds"} | {"images_per_second": speed[role]}
        seconds = {stage: done["seconds"] for stage in ("learn_mask", "recover") if (done := folder.result(stage)) is not None}
        seconds["evaluate"] = sum(folder.result(f"evaluate_{role}")["seconds"] for role in models)
        results["seconds"] = seconds
        last = "recovered" if "recovered" in models else "pruned" if "pruned" in models else None
        if last is not None:
            depth = {role: results[role]["depth"] for role in ("teacher", last)}
            results["speedup"] = {"measured": speed[last] / speed["teacher"], "ideal": depth["teacher"] / depth[last]}
        results["peak_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        results["protocol"] = self.protocol(inputs)
        write_json(folder / "metrics.json", results)
        folder.finish("evaluate", {"seconds": seconds["evaluate"]})

    def protocol(self, inputs: Inputs) -> dict[str, Any]:
        """What two results must share to be comparable."""
        return {"num_samples": self.num_samples, "num_reference": len(inputs.data.reference_pictures()[0]), "labels": "balanced",
                "seed": inputs.seed, **self.sampling, "feature_network": type(self.metrics.feature_network).__name__}


def describe(model: nn.Module) -> dict[str, int]:
    """Depth (blocks in all stacks) and parameters of a model."""
    return {"depth": sum(len(stack) for stack in find_stacks(model).values()), "num_params": sum(p.numel() for p in model.parameters())}
