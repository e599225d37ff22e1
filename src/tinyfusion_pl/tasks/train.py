"""Training of a denoiser, from scratch or from other weights, as for the digits teachers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import seed_everything
from torch import nn

from tinyfusion_pl.artifacts import save_tensors, sha256, write_json
from tinyfusion_pl.callbacks import NonFiniteGuard
from tinyfusion_pl.checksums import model_sha256
from tinyfusion_pl.data import GenerationDataModule
from tinyfusion_pl.models import (
    create_model,
    library_versions,
    load_checkpoint,
    load_pretrained,
    load_weights,
)
from tinyfusion_pl.models.records import TRAINING_IMAGES
from tinyfusion_pl.modules import Denoising
from tinyfusion_pl.objectives.base import Objective
from tinyfusion_pl.pruning import find_stacks
from tinyfusion_pl.tasks.checkpoint_io import verify
from tinyfusion_pl.tasks.evaluate import Evaluate
from tinyfusion_pl.tasks.fitting import Fit
from tinyfusion_pl.tasks.folder import Inputs, RunFolder, say
from tinyfusion_pl.tasks.origins import (
    CONFIGURATION,
    SAMPLES,
    check_asked,
    check_logs,
    check_origin,
    files_left,
    get_log_dir,
    needs_remaking,
)
from tinyfusion_pl.tasks.results import describe
from tinyfusion_pl.tasks.tracking import tracked


@dataclass(kw_only=True)
class Train:
    """Training of a model.

    Args:
        module: Factory of `Denoising`, called with a denoiser and ``objective=``.
        fit: The training.
        weights: Weights of the trained model, ``"ema"`` or ``"raw"``.
        start_from: Initial weights, as `load_pretrained` takes them; None: random.
        block_order: With `start_from`, for each block the index of the block whose weights it
        starts
            from, counted over all stacks: a permutation. None: the original order.
    """

    module: Callable[..., Denoising]
    fit: Fit
    weights: str = "ema"
    start_from: str | None = None
    block_order: Sequence[int] | None = None

    def __post_init__(self) -> None:
        self.fit.check_weights("train", self.weights)
        if self.block_order is not None and self.start_from is None:
            raise ValueError(
                "train.block_order is given without train.start_from, so there are no blocks to "
                "order. Set train.start_from."
            )

    def create(self, model: str, **arguments: Any) -> nn.Module:
        """The model at the start of training.

        Raises:
            ValueError: for an unknown model, or weights or an order that do not fit it.
        """
        if self.start_from is None:
            return create_model(model, **arguments)
        denoiser = load_pretrained(self.start_from, name=model, **arguments).train()
        if self.block_order is not None:
            reorder_blocks(denoiser, self.block_order)
        return denoiser


def reorder_blocks(model: nn.Module, order: Sequence[int]) -> None:
    """Copy the weights of block ``order[i]`` to block i, counted over all stacks, in place.

    Raises:
        ValueError: unless `order` is a permutation, and moves blocks only to places of their kind.
    """
    stacks = list(find_stacks(model).values())
    blocks = [block for stack in stacks for block in stack]
    if sorted(order) != list(range(len(blocks))):
        raise ValueError(
            f"train.block_order is {list(order)}, but the model has {len(blocks)} blocks; give "
            f"each of 0..{len(blocks) - 1} once."
        )
    states = [
        {name: tensor.clone() for name, tensor in block.state_dict().items()} for block in blocks
    ]
    try:
        for block, source in zip(blocks, order):
            block.load_state_dict(states[source])
    except RuntimeError as error:
        raise ValueError(
            f"train.block_order moves blocks to places of another kind: {error}"
        ) from error


def train_denoiser(
    *,
    run_dir: str | Path,
    name: str,
    seed: int,
    model: str,
    objective: Objective,
    data: GenerationDataModule,
    train: Train,
    evaluate: Evaluate,
    recipe: str | None,
    overrides: dict[str, Any] | None = None,
    begin: Callable[[], None] | None = None,
) -> None:
    """Train a new `model` and save ``trained/model.safetensors`` and ``trained/record.json``.

    The record has recipe, seed and metrics; ``model.checkpoint`` takes the folder. `begin` is
    called once all checks have passed, before anything is written.
    """
    seed_everything(seed, workers=True)
    denoiser = train.create(model, **(overrides or {}))
    inputs = Inputs(name=name, seed=seed, teacher=denoiser, objective=objective, data=data)
    data.check_fits(denoiser)
    objective.check_fits(denoiser)
    train.fit.check("train", train.module(denoiser, objective=objective))
    data.check_processes(train.fit.num_processes())
    evaluate.check(inputs)
    if begin is not None:
        begin()
    with tracked(train.fit.logger) as ended:
        _train(RunFolder(run_dir), inputs, denoiser, train, evaluate, recipe)
        ended(Path(run_dir), "train")


def _train(
    folder: RunFolder,
    inputs: Inputs,
    denoiser: nn.Module,
    train: Train,
    evaluate: Evaluate,
    recipe: str | None,
) -> None:
    name, seed, objective, data = inputs.name, inputs.seed, inputs.objective, inputs.data
    # Images that the initial weights were trained on; None: unknown.
    source: Any = getattr(denoiser, "source", {})
    before = 0 if train.start_from is None else source.get(TRAINING_IMAGES)
    started_from = None if train.start_from is None else model_sha256(denoiser)
    parts = {
        CONFIGURATION: folder.configuration,
        SAMPLES: data.samples_sha256(),
        "first weights": started_from,
    }
    made_from = {name: checksum for name, checksum in parts.items() if checksum is not None}
    asked = {"num_steps": train.fit.num_steps("train"), "seed": seed}
    if (done := folder.result("train")) is not None:
        check_origin(folder, "train", done, made_from)
        check_asked(folder, "train", done, asked)
        check_logs(folder, "train", done)
    if done is None or needs_remaking(folder, "train", done, below="trained"):
        say(
            f"train: training {name}; checkpoints will be saved to {folder / 'train'}, the model "
            f"to {folder / 'trained'}"
        )
        # A copy: a strategy may shard its weights.
        module = train.module(copy.deepcopy(denoiser), objective=objective)
        seconds = train.fit.run(
            "train", folder, module, data, first=[NonFiniteGuard()], made_from=made_from
        )
        verify(folder.checkpoint("train"))
        load_weights(denoiser, load_checkpoint(folder.checkpoint("train"), weights=train.weights))
        (folder / "trained").mkdir(parents=True, exist_ok=True)
        save_tensors(folder / "trained" / "model.safetensors", denoiser.state_dict())
        folder.finish(
            "train",
            {
                "seconds": seconds if done is None else done["seconds"],
                "made_from": made_from,
                **asked,
                "files": files_left(folder.path, ["trained/model.safetensors"]),
                "logs": files_left(folder.path, [get_log_dir("train")]),
            },
        )
    load_weights(denoiser, folder / "trained" / "model.safetensors")
    say(f"train: measuring {evaluate.num_samples:,} samples")
    protocol = evaluate.protocol(inputs)
    results, _ = evaluate.measure(
        evaluate.sampler(denoiser, inputs),
        folder,
        inputs,
        role="trained",
        made_from=evaluate.made_from(denoiser, folder, inputs, role="teacher", protocol=protocol),
    )
    metrics = {**describe(denoiser), **results}
    write_json(
        folder / "trained" / "record.json",
        {
            "model": {"name": denoiser.model_name, "kwargs": denoiser.config},
            "recipe": recipe,
            "seed": seed,
            **(
                {}
                if before is None
                else {TRAINING_IMAGES: before + train.fit.num_images("train", data)}
            ),
            "metrics": metrics,
            "seconds": folder.get_result("train")["seconds"],
            "protocol": protocol,
            "versions": library_versions(),
            "weights": {
                "file": "model.safetensors",
                "sha256": sha256(folder / "trained" / "model.safetensors"),
                "kind": train.weights,
            },
        },
    )
    say(f"Done. {folder / 'trained'}: {metrics}")
