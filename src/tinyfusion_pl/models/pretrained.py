"""Trained denoisers: published ones by name, those the package ships, and those in a file or folder."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion_pl.artifacts import ArtifactError, sha256
from tinyfusion_pl.models.building import build_model, check_arguments
from tinyfusion_pl.models.checkpoints import read_checkpoint
from tinyfusion_pl.models.diffusers_layout import is_diffusers_folder, read_diffusers_folder
from tinyfusion_pl.models.dit import DiT
from tinyfusion_pl.models.families import (
    dit_of_width,
    get_arguments,
    name_and_sizes,
    plain_state,
    predicts_variance,
)
from tinyfusion_pl.models.notices import warn
from tinyfusion_pl.models.published import (
    PUBLISHED,
    RENAMED,
    Published,
    fetch_published,
    published_as,
)
from tinyfusion_pl.models.records import RECORD, TRAINING_IMAGES, read_record
from tinyfusion_pl.models.registry import create_model, list_models, model_family, registered_name
from tinyfusion_pl.models.shallow import check_weights, load_shallow
from tinyfusion_pl.models.sit import SiT
from tinyfusion_pl.models.weight_files import weights_sha256
from tinyfusion_pl.models.weight_sets import WEIGHTS

SHIPPED = {"dit_digits": "digits_teacher"}
RANDOM = "random"


def load_denoiser(
    name: str,
    *,
    checkpoint: str | Path | None = None,
    weights: str = "ema",
    prefix: str = "",
    variant: str | None = None,
    **overrides: Any,
) -> nn.Module:
    """`load_pretrained` of `checkpoint` as the model `name`: what configurations call.

    Raises:
        ValueError: when no checkpoint is given; says how to get one. Else as `load_pretrained`.
    """
    own = registered_name(name)
    if checkpoint is None:
        known = {file: record for file, record in PUBLISHED.items() if record.model == own}
        where = (
            " Train one, or"
            if not known
            else (
                f" Published are {', '.join(f'{file} ({record.url})' for file, record in known.items())}. Give one of these names as "
                "model.checkpoint to download it, or"
            )
        )
        raise ValueError(
            f"Model {name!r} has no weights: model.checkpoint is not set.{where} give model.checkpoint=PATH."
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
    """A trained model in evaluation mode; its ``source`` says where the weights came from, and which were taken.

    What it is built as: a record beside the weights or inside a safetensors file says everything; a published name says the model;
    otherwise `name` does, of which only the depths are read from the file (so a shallow checkpoint of ``dit_xl_2`` loads as such). Without
    `name`, all sizes are read from the file: of a DiT (heads: of the registered model of equal width) and of published MARs.

    SiT's files have the keys and shapes of DiT's: give ``name="sit_xl_2"``. Where a file says which of them it is (its published name, the
    arguments of its training, a record), the other is refused. Where it says nothing it is taken for a DiT, and refused as one where the
    variance's half of the last layer is all zeros, as training leaves a SiT's; as a SiT it warns where that half is not.

    Args:
        name_or_path: A published name (see docs/checkpoints.md; downloaded once to torch's cache folder), ``"shipped"`` for weights in the
            package, a ``.safetensors``, ``.pt``, ``.pth`` or ``.ckpt`` file, a folder with ``model.safetensors`` and ``record.json``, or
            one of diffusers. What exists under that path comes first. ``"random"``: no trained model, but one to try a recipe with.
        name: The model, see `list_models`.
        weights: ``"ema"`` or ``"raw"``, where the file has both, or the entry of the file that is meant (see `load_checkpoint`). ``source``
            states under ``weights`` what was taken, ``"unstated"`` where the file does not say, and under ``key`` the entry.
        prefix: Of the weights' names in a file that holds several models, e.g. ``"student."``. One that all names have is taken off.
        variant: Of a diffusers folder, ``"fp16"`` for ``diffusion_pytorch_model.fp16.safetensors``.
        overrides: Arguments of the model, e.g. ``activation_checkpointing=True``.

    Raises:
        ValueError: when the weights do not fit the model, or are another family's, or it cannot be told which model they are of.
        ArtifactError: for a missing or broken file, or one that cannot be downloaded.
    """
    own = None if name is None else registered_name(name)
    if (
        weights not in WEIGHTS
        and not Path(name_or_path).is_file()
        and (name_or_path in ("shipped", RANDOM) or Path(name_or_path).is_dir())
    ):
        raise ValueError(
            f"weights is {weights!r}; give 'ema' or 'raw' (model.weights). Entries by name are of checkpoint files, and "
            f"{name_or_path} is none."
        )
    if name_or_path == "shipped":
        return _shipped(own or next(iter(SHIPPED)), overrides)
    path, options = Path(name_or_path), {"weights": weights, "prefix": prefix, "variant": variant}
    if name_or_path == RANDOM and not path.exists():
        return _random(own, overrides)
    known = RENAMED.get(text := str(name_or_path), text)
    if known in PUBLISHED and not path.exists():
        record = PUBLISHED[known]
        _refuse_other_family(own, registered_name(record.model), known)
        path = fetch_published(known)
        model = _from_path(path, own or record.model, options, {**record.kwargs, **overrides})
        model.source = {**model.source, "path": known, "url": record.url, **_trained_on(record)}
        if record.sha256 not in (None, model.source["sha256"]):
            raise ArtifactError(
                f"{path} is not the published {known}: its checksum is {model.source['sha256'][:12]}..., that of the "
                f"published file {record.sha256[:12]}.... Remove it, then run again."
            )
        return model
    if not path.exists():
        near = difflib.get_close_matches(path.name, PUBLISHED, n=2)
        raise ArtifactError(
            f"There is no checkpoint at {path}. {'Did you mean ' + ' or '.join(near) + '? ' if near else ''}Give the path "
            "of a .safetensors, .pt or .ckpt file, of a shallow or a diffusers folder, or a published name: "
            f"{', '.join(PUBLISHED)}."
        )
    if path.is_file() and (record := published_as(path)):
        _refuse_other_family(own, record.model, path)
        own = own or registered_name(record.model)
        overrides = {**(record.kwargs if own == record.model else {}), **overrides}
        model = _from_path(path, own, options, overrides)
        model.source |= _trained_on(record)
        return model
    return _from_path(path, own, options, overrides)


def _trained_on(record: Published) -> dict[str, int]:
    return (
        {} if record.num_training_images is None else {TRAINING_IMAGES: record.num_training_images}
    )


def _from_path(
    path: Path, own: str | None, options: Mapping[str, Any], overrides: dict[str, Any]
) -> nn.Module:
    folder_of_diffusers = (
        path.is_dir() and not (path / RECORD).is_file() and is_diffusers_folder(path)
    )
    if options["variant"] is not None and not folder_of_diffusers:
        raise ValueError(
            f"variant={options['variant']!r} is of a diffusers folder, and {path} is none. Leave it out (model.variant=null)."
        )
    if options["prefix"] and not path.is_file():
        raise ValueError(
            f"prefix={options['prefix']!r} is of the names in a file, and {path} is a folder. Leave it out."
        )
    if path.is_file():
        return _from_file(path, own, options["weights"], options["prefix"], overrides)
    if (path / RECORD).is_file():
        return _from_record(path, own, overrides)
    if folder_of_diffusers:
        return _from_diffusers(path, own, options["variant"], overrides)
    raise ArtifactError(
        f"{path} holds no model: {RECORD} with model.safetensors, or a diffusers folder (config.json or "
        "transformer/config.json), was expected."
    )


def _from_file(
    path: Path, own: str | None, weights: str, prefix: str, overrides: dict[str, Any]
) -> nn.Module:
    checkpoint = read_checkpoint(path, weights=weights, prefix=prefix)
    said = checkpoint.stated
    stated = _registered(said.get("model"))
    _refuse_other_family(own, stated, path)
    state = plain_state(checkpoint.state, path, name=own or stated)
    if stated and "config" in said and own in (None, stated):
        own, arguments = stated, _config_in(said["config"], stated, path)
    elif own is None:
        own, arguments = name_and_sizes(state, path, name=stated, given=overrides)
    else:
        arguments = get_arguments(state, own, path, given=overrides)
    if stated is None:
        _tell_dit_from_sit(state, own, path)
    model = build_model(own, {**arguments, **overrides}, state, path)
    model.source = {"path": str(path), "sha256": sha256(path), **checkpoint.source}
    return model


def _config_in(text: str, name: str, path: Path) -> dict[str, Any]:
    """The arguments that a safetensors file states in its metadata, under ``config``."""
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{path}: 'config' in its metadata is no JSON ({error}). Export the model again."
        ) from error
    if not isinstance(config, dict):
        raise ArtifactError(
            f"{path}: 'config' in its metadata is {type(config).__name__}; the model's arguments by name were expected. "
            "Export the model again."
        )
    check_arguments(name, config, f"{path}: 'config' in its metadata")
    return config


def _tell_dit_from_sit(state: Mapping[str, Tensor], own: str, path: Path) -> None:
    """Names and shapes are equal; what is left is the half of the last layer that predicts the variance."""
    trained = predicts_variance(state)
    if trained is False and model_family(own) is DiT:
        raise ValueError(
            f"{path} is no DiT's: the half of its last layer that predicts the variance is all zeros, as a SiT leaves it. "
            "Give name=sit_xl_2 (model=sit_xl_2), or another SiT's name."
        )
    if trained and model_family(own) is SiT:
        warn(
            f"{path} is loaded as {own}, but looks like a DiT's: the half of its last layer that a SiT does not use is not zero. "
            "If it is a DiT's, the samples will be wrong: give name=dit_xl_2 (model=dit_xl_2)."
        )


def _from_record(folder: Path, own: str | None, overrides: dict[str, Any]) -> nn.Module:
    """The shallow model in `folder`, or a trained one, whose record has no decision."""
    record = read_record(folder)
    stated = record.get("model") or {}
    if own is not None and stated and registered_name(stated["name"]) != own:
        raise ValueError(
            f"{folder} holds a {stated['name']}, not a {own}. Give the model that its {RECORD} names, or another folder."
        )
    if "stacks" in record:
        model = load_shallow(folder, **overrides)
    elif stated:
        check_arguments(stated["name"], stated["kwargs"], f"{folder / RECORD}: model.kwargs")
        state = read_checkpoint(check_weights(folder, record)).state
        model = build_model(stated["name"], {**stated["kwargs"], **overrides}, state, folder)
    else:
        raise ArtifactError(f"{folder / RECORD} does not say which model it is of.")
    seen = {TRAINING_IMAGES: record[TRAINING_IMAGES]} if TRAINING_IMAGES in record else {}
    model.source = {"path": str(folder), "sha256": record["weights"]["sha256"], **seen}
    return model.eval()


def _shipped(own: str, overrides: dict[str, Any]) -> nn.Module:
    if own not in SHIPPED:
        raise ValueError(
            f"The package ships weights for {', '.join(SHIPPED)}, not for {own!r}; give model.checkpoint=PATH."
        )
    with as_file(files("tinyfusion_pl") / "assets" / SHIPPED[own]) as folder:
        model = _from_record(folder, own, overrides)
    model.source = {**model.source, "path": f"shipped:{SHIPPED[own]}"}
    return model


def _random(own: str | None, overrides: dict[str, Any]) -> nn.Module:
    """The same random weights each time; where the initialisation has zeros (adaLN-Zero, at which every block is the identity), too."""
    if own is None:
        raise ValueError("Random weights need the name of a model. Give name=, e.g. 'dit_xl_2'.")
    warn(f"{own} is randomly initialised: its images and every number measured of it mean nothing.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_model(own, **overrides)
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.02)
    model.source = {"path": RANDOM}
    return model.eval()


def _from_diffusers(
    folder: Path, own: str | None, variant: str | None, overrides: dict[str, Any]
) -> nn.Module:
    state, arguments, file = read_diffusers_folder(folder, variant=variant)
    if own is not None and model_family(own) is not DiT:
        raise ValueError(
            f"{folder} holds a DiT of diffusers, and {own} is none. Give the name of a DiT, or no name."
        )
    model = build_model(own or dit_of_width(arguments), {**arguments, **overrides}, state, file)
    model.source = {"path": str(folder), "sha256": weights_sha256(file), "key": file.name}
    return model


def _registered(name: str | None) -> str | None:
    """A name that a file states, if it is one of ours."""
    if name is None:
        return None
    try:
        return registered_name(name)
    except ValueError:
        return None


def _refuse_other_family(own: str | None, stated: str | None, path: str | Path) -> None:
    if own is None or _registered(stated) is None:
        return
    if model_family(own) is not model_family(stated):
        near = [each for each in list_models() if model_family(each) is model_family(stated)]
        other = stated if stated in near else near[0]
        raise ValueError(
            f"{path} is of {stated}, another family than {own}, even where names and shapes are equal. Give "
            f"name={other} (model.name={other}), or a checkpoint of {own}."
        )
