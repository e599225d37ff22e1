"""The shallow model on disk: ``model.safetensors`` with ``record.json`` beside it, and nothing else needed to load it."""

from __future__ import annotations

import copy
import logging
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tinyfusion_pl.artifacts import ArtifactError, save_tensors, sha256
from tinyfusion_pl.checksums import write_sealed
from tinyfusion_pl.models.building import build_model, check_arguments
from tinyfusion_pl.models.checkpoints import read_checkpoint
from tinyfusion_pl.models.factories import from_factory
from tinyfusion_pl.models.fitting import fit_weights
from tinyfusion_pl.models.library_models import (
    DIFFUSERS_WEIGHTS,
    LIBRARIES,
    load_library_model,
    not_savable,
    remove_library_files,
    save_library_model,
)
from tinyfusion_pl.models.records import RECORD, check_depths, get_decision, maps_in, read_record
from tinyfusion_pl.models.sources import set_record
from tinyfusion_pl.pruning import Decision, remove_blocks
from tinyfusion_pl.pruning.blocks import unwrap, without_compiling
from tinyfusion_pl.pruning.compiled import uncompiled
from tinyfusion_pl.pruning.run_maps import RunMap, attach_maps, get_maps

log = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
FORMAT = 1


def library_versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {"python": platform.python_version()}
    for name in ("tinyfusion_pl", "torch", "lightning", "timm", "peft", "torchmetrics"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def save_shallow(folder: str | Path, model: nn.Module, record: Mapping[str, Any]) -> Path:
    """Write `model` and its record into `folder`, weights first, each file whole or not at all.

    Args:
        folder: Made if missing.
        model: The shallow model. One of this project's models (``model_name``, ``config``) states
            how to build it; one of diffusers or transformers is saved by its library besides, so
            that its plain ``from_pretrained`` opens the folder.
        record: ``stacks`` (see `Decision.as_dict`), ``width`` where it is another, ``source``,
            ``configuration``, ``seed``, ``model_factory``. How to build the model, versions, size,
            the weights' checksum and the places of linear maps are added.

    Returns:
        The folder.
    """
    folder, model = Path(folder), unwrap(model)
    with without_compiling(model):
        library = _save_weights(folder, model)
    own = (
        {"name": model.model_name, "kwargs": model.config}
        if hasattr(model, "model_name") and hasattr(model, "config")
        else None
    )
    maps = [each.as_dict() for each in get_maps(model)]
    write_sealed(
        folder / RECORD,
        {
            "format": FORMAT,
            "model": own,
            "library": library,
            **record,
            **({"run_maps": maps} if maps else {}),
            "num_params": sum(p.numel() for p in model.parameters()),
            "weights": {"file": WEIGHTS, "sha256": sha256(folder / WEIGHTS)},
            "versions": library_versions(),
        },
    )
    return folder


def _save_weights(folder: Path, model: nn.Module) -> dict[str, str] | None:
    """Write the weights: by the library that can open `model`, whose entry for the record is returned; else as a state dict."""
    reason = not_savable(model)
    if reason is None:
        return save_library_model(folder, model, WEIGHTS)
    if folder.is_dir():
        remove_library_files(folder)
    if type(model).__module__.partition(".")[0] in LIBRARIES:
        log.warning(
            "%s The shallow model in %s is a state dict with its record: load_shallow(path, model=...) reads it.",
            reason,
            folder,
        )
    save_tensors(
        folder / WEIGHTS, {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    )
    return None


def check_weights(folder: Path, record: Mapping[str, Any]) -> Path:
    """The file of weights in `folder`, which must be the one that `record` was written for, and so must its library's copy."""
    expected = record["weights"]["sha256"]
    for file in (folder / WEIGHTS, folder / DIFFUSERS_WEIGHTS):
        if file.name != WEIGHTS and (not file.exists() or file.samefile(folder / WEIGHTS)):
            continue
        if (found := sha256(file)) != expected:
            raise ArtifactError(
                f"{file} has checksum {found[:12]}..., its record says {expected[:12]}...: the file was altered or "
                "only partly copied. Copy the folder again."
            )
    return folder / WEIGHTS


def load_shallow(
    path: str | Path, *, model: nn.Module | None = None, **overrides: Any
) -> nn.Module:
    """The shallow model that was saved in folder `path`, in evaluation mode.

    Args:
        path: Folder with ``model.safetensors`` and ``record.json``.
        model: A dense model of the same kind, for models that the record cannot build (no model of
            this project, of diffusers or of transformers, no `model_factory`); it is copied, not
            changed.
        overrides: Arguments of a model of this project that its record does not say, e.g.
            ``activation_checkpointing=True``.

    Raises:
        ArtifactError: for a missing, truncated or altered file.
        ValueError: when the record cannot build the model and none is given, or the weights do not
            fit.
    """
    folder = Path(path)
    record = read_record(folder, decided=True)
    if record.get("format") != FORMAT:
        raise ArtifactError(
            f"{folder / RECORD} has format {record.get('format')!r:.80}, this version reads {FORMAT}."
        )
    weights, stated = check_weights(folder, record), record.get("model")
    if overrides and (model is not None or stated is None):
        raise ValueError(
            f"{', '.join(overrides)} is of this project's models, and the record in {folder} names none."
        )
    decision, state = get_decision(record, folder / RECORD), read_checkpoint(weights).state
    maps = maps_in(record, state, folder / RECORD)
    shallow = _built(
        folder,
        record,
        decision.kept_blocks,
        state,
        weights,
        model,
        overrides,
        lambda cut: _with_maps(cut, maps, folder),
    )
    check_depths(shallow, decision, folder / RECORD)
    return shallow.eval()


def _built(
    folder: Path,
    record: Mapping[str, Any],
    kept: Mapping[str, Sequence[int]],
    state: Mapping[str, Tensor],
    weights: Path,
    model: nn.Module | None,
    overrides: Mapping[str, Any],
    prepare: Callable[[nn.Module], nn.Module],
) -> nn.Module:
    stated = record.get("model")
    if (library := record.get("library")) is not None:
        shallow = load_library_model(folder, library, state)
        if model is not None:  # of a class of one's own, with the same weights
            own = remove_blocks(uncompiled(copy.deepcopy(model)), kept)
            own.load_state_dict(shallow.state_dict())
            shallow = own
        return shallow
    if model is None and stated is not None:
        check_arguments(stated["name"], stated["kwargs"], f"{folder / RECORD}: model.kwargs")
        built = build_model(
            stated["name"], {**stated["kwargs"], **overrides}, state, weights, prepare=prepare
        )
        return set_record(built, record, folder)
    if model is not None:
        shallow = prepare(remove_blocks(uncompiled(copy.deepcopy(model)), kept))
    elif record.get("model_factory"):
        shallow = from_factory(
            record["model_factory"], kept, state, folder / RECORD, prepare=prepare
        )
    else:
        raise ValueError(
            f"The record in {folder} does not say how to build its model, which is not one of this project nor one that its "
            "library opens. Give a dense one: "
            "load_shallow(path, model=MyModel(...)), or state model_factory={'name': 'timm/...'} when pruning."
        )
    return fit_weights(shallow, state, weights)


def _with_maps(model: nn.Module, maps: Sequence[RunMap], folder: Path) -> nn.Module:
    try:
        return attach_maps(model, maps)
    except ValueError as error:
        raise ArtifactError(
            f"{folder / RECORD}: 'run_maps' does not fit its model: {error} Copy the folder again."
        ) from error


def load_decision(path: str | Path) -> Decision:
    """The decision in the record of the shallow model in folder `path`."""
    return get_decision(read_record(path, decided=True), Path(path) / RECORD)
