"""Trained denoisers: published ones by name, shipped ones, and those in a file or folder."""

from __future__ import annotations

import difflib
import json
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from tinyfusion_pl.artifacts import ArtifactError, sha256
from tinyfusion_pl.models.building import build_model, check_arguments
from tinyfusion_pl.models.checkpoints import read_checkpoint
from tinyfusion_pl.models.detection import get_arguments, name_and_sizes, plain_state
from tinyfusion_pl.models.diffusers_folders import is_diffusers_folder, read_diffusers_folder
from tinyfusion_pl.models.notices import warn
from tinyfusion_pl.models.published import (
    PUBLISHED,
    Published,
    fetch_published,
    find_published,
    published_name,
)
from tinyfusion_pl.models.records import RECORD, TRAINING_IMAGES, read_record
from tinyfusion_pl.models.registry import (
    create_model,
    get_family,
    list_families,
    list_models,
    model_class,
    registered_name,
)
from tinyfusion_pl.models.shallow import check_weights, load_shallow
from tinyfusion_pl.models.sources import add_source, get_source, set_record, set_source
from tinyfusion_pl.models.weight_files import weights_sha256
from tinyfusion_pl.models.weight_sets import WEIGHTS

RANDOM = "random"


class _Options(NamedTuple):
    """Which weights to take from a file or folder, see `load_pretrained`."""

    weights: str
    prefix: str
    variant: str | None


def load_denoiser(
    name: str,
    *,
    checkpoint: str | Path | None = None,
    weights: str = "ema",
    prefix: str = "",
    variant: str | None = None,
    **overrides: Any,
) -> nn.Module:
    """`load_pretrained` of `checkpoint` as the model `name`; configurations call this.

    Raises:
        ValueError: No checkpoint is given, or as `load_pretrained`.
    """
    own = registered_name(name)
    if checkpoint is None:
        known = {file: record for file, record in PUBLISHED.items() if record.model == own}
        if known:
            remedy = (
                f"Published: {', '.join(f'{file} ({record.url})' for file, record in known.items())}. "
                "Set model.checkpoint to one of these names to download it, or"
            )
        else:
            remedy = "Train one, or"
        raise ValueError(
            f"Model {name!r} has no weights: model.checkpoint is not set. {remedy} give "
            "model.checkpoint=PATH."
        )
    return load_pretrained(
        checkpoint, name=own, weights=weights, prefix=prefix, variant=variant, **overrides
    )


def load_pretrained(
    name_or_path: str | Path,
    *,
    name: str | None = None,
    weights: str = "ema",
    prefix: str = "",
    variant: str | None = None,
    **overrides: Any,
) -> nn.Module:
    """Load a trained model in evaluation mode; its ``source`` states where the weights are from.

    The model is determined by the first of these that applies: a record beside the weights or
    inside
    a safetensors file; a published name; `name`, with only the depths read from the file, so that a
    shallow checkpoint of ``dit_xl_2`` loads as such. Otherwise all sizes are read from the file,
    for DiT (number of heads: that of the registered model of equal width) and published MARs.

    SiT files have DiT's keys and shapes: give ``name="sit_xl_2"``. A file that states its model (by
    its published name, training arguments or record) is never loaded as another family. One that
    states nothing is loaded as a DiT, unless the variance half of its final layer is all zeros,
    which is a SiT's; loading it as a SiT warns where that half is not zero.

    Args:
        name_or_path: A published name (docs/checkpoints.md; downloaded once to torch's cache
            folder), ``"shipped"`` for weights in the package, a ``.safetensors``, ``.pt``, ``.pth``
            or ``.ckpt`` file, a folder with ``model.safetensors`` and ``record.json``, or a folder
            of diffusers. An existing path takes precedence. ``"random"``: untrained weights, to try
            a recipe.
        name: Registered name, see `list_models`.
        weights: ``"ema"`` or ``"raw"``, where the file has both, or an entry of the file (see
            `load_checkpoint`). ``source`` states under ``weights`` what was taken, ``"unstated"``
            where the file does not say, and under ``key`` the entry.
        prefix: Prefix of the weights' names in a file with several models, e.g. ``"student."``. A
            prefix that all names share is removed automatically.
        variant: Variant in a diffusers folder: ``"fp16"`` for
            ``diffusion_pytorch_model.fp16.safetensors``.
        overrides: Arguments of the model, e.g. ``activation_checkpointing=True``.

    Raises:
        ValueError: The weights do not fit the model or belong to another family, or the model is
            not recognized.
        ArtifactError: A file is missing or broken, or could not be downloaded.
    """
    own = None if name is None else registered_name(name)
    if (
        weights not in WEIGHTS
        and not Path(name_or_path).is_file()
        and (name_or_path in ("shipped", RANDOM) or Path(name_or_path).is_dir())
    ):
        raise ValueError(
            f"Invalid weights {weights!r} for {name_or_path}: expected 'ema' or 'raw' "
            "(model.weights). Only checkpoint files have named entries."
        )
    if name_or_path == "shipped":
        return _shipped(own, overrides)
    path, options = Path(name_or_path), _Options(weights, prefix, variant)
    if name_or_path == RANDOM and not path.exists():
        return _random(own, overrides)
    known = published_name(str(name_or_path))
    if known in PUBLISHED and not path.exists():
        return _from_published(known, own, options, overrides)
    if not path.exists():
        near = difflib.get_close_matches(path.name, PUBLISHED, n=2)
        raise ArtifactError(
            f"There is no checkpoint at {path}. "
            f"{'Did you mean ' + ' or '.join(near) + '? ' if near else ''}Give the path of a "
            ".safetensors, .pt or .ckpt file, of a shallow or a diffusers folder, or a published "
            f"name: {', '.join(PUBLISHED)}."
        )
    if path.is_file() and (record := find_published(path)):
        _refuse_other_family(own, record.model, path)
        own = own or registered_name(record.model)
        overrides = {**(record.kwargs if own == record.model else {}), **overrides}
        return add_source(_from_path(path, own, options, overrides), **_trained_on(record))
    return _from_path(path, own, options, overrides)


def _from_published(
    known: str, own: str | None, options: _Options, overrides: dict[str, Any]
) -> nn.Module:
    record = PUBLISHED[known]
    _refuse_other_family(own, registered_name(record.model), known)
    path = fetch_published(known)
    model = _from_path(path, own or record.model, options, {**record.kwargs, **overrides})
    found = get_source(model)["sha256"]
    if record.sha256 not in (None, found):
        raise ArtifactError(
            f"{path} is not the published {known}: its checksum is {found[:12]}..., expected "
            f"{str(record.sha256)[:12]}.... Remove it and run again."
        )
    return add_source(model, path=known, url=record.url, **_trained_on(record))


def _trained_on(record: Published) -> dict[str, int]:
    if record.num_training_images is None:
        return {}
    return {TRAINING_IMAGES: record.num_training_images}


def _from_path(
    path: Path, own: str | None, options: _Options, overrides: dict[str, Any]
) -> nn.Module:
    folder_of_diffusers = (
        path.is_dir() and not (path / RECORD).is_file() and is_diffusers_folder(path)
    )
    if options.variant is not None and not folder_of_diffusers:
        raise ValueError(
            f"variant={options.variant!r} requires a diffusers folder, and {path} is not one. Remove "
            "it (model.variant=null)."
        )
    if options.prefix and not path.is_file():
        raise ValueError(
            f"prefix={options.prefix!r} requires a file, and {path} is a folder. Remove it."
        )
    if path.is_file():
        return _from_file(path, own, options, overrides)
    if (path / RECORD).is_file():
        return _from_record(path, own, overrides)
    if folder_of_diffusers:
        return _from_diffusers(path, own, options.variant, overrides)
    raise ArtifactError(
        f"{path} does not hold a model: expected {RECORD} with model.safetensors, or a diffusers "
        "folder (config.json or transformer/config.json)."
    )


def _from_file(
    path: Path, own: str | None, options: _Options, overrides: dict[str, Any]
) -> nn.Module:
    checkpoint = read_checkpoint(path, weights=options.weights, prefix=options.prefix)
    stated = _registered(checkpoint.stated.get("model"))
    _refuse_other_family(own, stated, path)
    state = plain_state(checkpoint.state, path, name=own or stated)
    if stated and "config" in checkpoint.stated and own in (None, stated):
        own, arguments = stated, _read_config(checkpoint.stated["config"], stated, path)
    elif own is None:
        own, arguments = name_and_sizes(state, path, name=stated, given=overrides)
    else:
        arguments = get_arguments(state, own, path, given=overrides)
    if stated is None:
        family = get_family(model_class(own))
        if family is not None and family.check_weights is not None:
            family.check_weights(state, own, path)
    model = build_model(own, {**arguments, **overrides}, state, path)
    return set_source(model, path=str(path), sha256=sha256(path), **checkpoint.source)


def _read_config(text: str, name: str, path: Path) -> dict[str, Any]:
    """Arguments in the metadata entry ``config`` of a safetensors file."""
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{path}: 'config' in its metadata is not valid JSON ({error}). Export the model again."
        ) from error
    if not isinstance(config, dict):
        raise ArtifactError(
            f"{path}: 'config' in its metadata is {type(config).__name__}; expected the model's "
            "arguments by name. Export the model again."
        )
    check_arguments(name, config, f"{path}: 'config' in its metadata")
    return config


def _from_record(folder: Path, own: str | None, overrides: dict[str, Any]) -> nn.Module:
    """The shallow model in `folder`, or a dense one, whose record has no decision."""
    record = read_record(folder)
    stated = record.get("model") or {}
    if own is not None and stated and registered_name(stated["name"]) != own:
        raise ValueError(
            f"{folder} holds a {stated['name']}, not a {own}. Give the model that its {RECORD} "
            "names, or another folder."
        )
    if "stacks" in record:
        model = load_shallow(folder, **overrides)
    elif stated:
        check_arguments(stated["name"], stated["kwargs"], f"{folder / RECORD}: model.kwargs")
        state = read_checkpoint(check_weights(folder, record)).state
        model = build_model(stated["name"], {**stated["kwargs"], **overrides}, state, folder)
        set_record(model, record, folder)
    else:
        raise ArtifactError(f"{folder / RECORD} does not name its model.")
    seen = {TRAINING_IMAGES: record[TRAINING_IMAGES]} if TRAINING_IMAGES in record else {}
    set_source(model, path=str(folder), sha256=record["weights"]["sha256"], **seen)
    return model.eval()


def _shipped(own: str | None, overrides: dict[str, Any]) -> nn.Module:
    shipped = {name: folder for each in list_families() for name, folder in each.shipped.items()}
    own = own or next(iter(shipped))
    if own not in shipped:
        raise ValueError(
            f"The package ships weights for {', '.join(shipped)}, not for {own!r}; give "
            "model.checkpoint=PATH."
        )
    with as_file(files("tinyfusion_pl") / "assets" / shipped[own]) as folder:
        model = _from_record(folder, own, overrides)
    return add_source(model, path=f"shipped:{shipped[own]}")


def _random(own: str | None, overrides: dict[str, Any]) -> nn.Module:
    """A model with the same random weights each time.

    Parameters that are initialized to zero (adaLN-Zero, where every block is the identity) get
    random values too.
    """
    if own is None:
        raise ValueError("Random weights need the name of a model. Give name=, e.g. 'dit_xl_2'.")
    warn(f"{own} is randomly initialized: its images and all results are meaningless.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_model(own, **overrides)
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.02)
    return set_source(model, path=RANDOM).eval()


def _from_diffusers(
    folder: Path, own: str | None, variant: str | None, overrides: dict[str, Any]
) -> nn.Module:
    found = read_diffusers_folder(folder, variant=variant)
    if own is not None and model_class(own) is not found.family.model:
        raise ValueError(
            f"{folder} holds a {found.family.name} of diffusers, and {own} is not a "
            f"{found.family.name}. Give the name of one, or no name."
        )
    arguments = {**found.arguments, **overrides}
    model = build_model(own or found.name, arguments, found.state, found.file)
    return set_source(
        model, path=str(folder), sha256=weights_sha256(found.file), key=found.file.name
    )


def _registered(name: str | None) -> str | None:
    """The name that a file states, if it is registered."""
    if name is None:
        return None
    try:
        return registered_name(name)
    except ValueError:
        return None


def _refuse_other_family(own: str | None, stated: str | None, path: str | Path) -> None:
    if own is None or stated is None or _registered(stated) is None:
        return
    if model_class(own) is not model_class(stated):
        near = [each for each in list_models() if model_class(each) is model_class(stated)]
        other = stated if stated in near else near[0]
        raise ValueError(
            f"{path} holds a {stated}, which is another family than {own}, even where names and "
            f"shapes are equal. Give name={other} (model.name={other}), or a checkpoint of {own}."
        )
