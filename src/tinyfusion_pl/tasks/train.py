"""Training a denoiser from scratch: how the shipped digits teacher was made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, seed_everything
from torch import nn

from tinyfusion_pl.artifacts import save_tensors, sha256, write_json
from tinyfusion_pl.callbacks import NonFiniteGuard
from tinyfusion_pl.models import create_model, library_versions, load_checkpoint, load_weights
from tinyfusion_pl.modules import Denoising
from tinyfusion_pl.tasks.checkpoint_io import verify
from tinyfusion_pl.tasks.evaluate import Evaluate
from tinyfusion_pl.tasks.fitting import Fit
from tinyfusion_pl.tasks.folder import Inputs, RunFolder, say
from tinyfusion_pl.tasks.origins import SAMPLES, check_logs, check_origin, files_left, logs_of, needs_remaking
from tinyfusion_pl.tasks.results import describe


@dataclass(kw_only=True)
class Train:
    """Training of a new model.

    Args:
        module: Makes `Denoising` from a denoiser and ``objective=``.
        fit: How it trains.
        weights: ``"ema"`` or ``"raw"``: which weights the model gets.
    """

    module: Callable[..., Denoising]
    fit: Fit
    weights: str = "ema"

    def __post_init__(self) -> None:
        self.fit.check_weights("train", self.weights)


def train_denoiser(*, run_dir: str | Path, name: str, seed: int, model: str, objective: Any, data: LightningDataModule, train: Train,
                   evaluate: Evaluate, recipe: str | None, overrides: dict[str, Any] | None = None,
                   begin: Callable[[], None] | None = None) -> None:
    """Train a new `model` and leave ``trained/model.safetensors`` with ``trained/record.json``: recipe, seed, metrics.

    The folder is what ``model.checkpoint`` takes and what the package ships. `begin` is called when all checks have passed, before
    anything is written.
    """
    seed_everything(seed, workers=True)
    denoiser: nn.Module = create_model(model, **(overrides or {}))
    inputs = Inputs(name=name, seed=seed, teacher=denoiser, objective=objective, data=data)
    data.check_fits(denoiser)
    objective.check_fits(denoiser)
    data.check_processes(train.fit.num_processes())
    evaluate.check(inputs)
    train.fit.check("train", train.module(denoiser, objective=objective))
    if begin is not None:
        begin()
    folder = RunFolder(run_dir)
    made_from = {name: checksum for name, checksum in (("configuration", folder.configuration), (SAMPLES, data.samples_sha256()))
                 if checksum is not None}
    if (done := folder.result("train")) is not None:
        check_origin(folder, "train", done, made_from)
        check_logs(folder, "train", done)
    if done is None or needs_remaking(folder, "train", done, below="trained"):
        say(f"train: {name}; checkpoints go to {folder / 'train'}, the model to {folder / 'trained'}")
        module = train.module(denoiser, objective=objective)
        seconds = train.fit.run("train", folder, module, data, first=[NonFiniteGuard()], made_from=made_from)
        verify(folder.checkpoint("train"))
        load_weights(denoiser, load_checkpoint(folder.checkpoint("train"), weights=train.weights))
        (folder / "trained").mkdir(parents=True, exist_ok=True)
        save_tensors(folder / "trained" / "model.safetensors", denoiser.state_dict())
        folder.finish("train", {"seconds": seconds if done is None else done["seconds"], "made_from": made_from,
                                "files": files_left(folder.path, ["trained/model.safetensors"]),
                                "logs": files_left(folder.path, [logs_of("train")])})
    load_weights(denoiser, folder / "trained" / "model.safetensors")
    say(f"train: measuring {evaluate.num_samples} samples")
    protocol = evaluate.protocol(inputs)
    results, _ = evaluate.measure(evaluate.sampler(denoiser, inputs), folder, inputs, role="trained",
                                  made_from=evaluate.made_from(denoiser, folder, inputs, protocol=protocol))
    metrics = {**describe(denoiser), **results}
    write_json(folder / "trained" / "record.json", {
        "model": {"name": denoiser.model_name, "kwargs": denoiser.config}, "recipe": recipe, "seed": seed, "metrics": metrics,
        "seconds": folder.result("train")["seconds"], "protocol": protocol, "versions": library_versions(),
        "weights": {"file": "model.safetensors", "sha256": sha256(folder / "trained" / "model.safetensors"), "kind": train.weights},
    })
    say(f"Done. {folder / 'trained'}: {metrics}")
