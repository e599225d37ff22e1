"""Results of an evaluation; earlier ones are reused only if they are complete and current."""

from __future__ import annotations

import math
import resource
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from tinyfusion_pl.artifacts import tensors_sha256, write_json
from tinyfusion_pl.checksums import Damaged, Origin, differences
from tinyfusion_pl.models.records import TRAINING_IMAGES
from tinyfusion_pl.pruning import find_stacks
from tinyfusion_pl.tasks.folder import RunFolder, say
from tinyfusion_pl.tasks.origins import changed_files

METRICS = "metrics.json"
# Entries of a model's stage file besides its metrics.
OF_THE_MARK = ("made_from", "files", "seconds", "run_dir")


def get_mark(role: str) -> str:
    """The stage that is finished when the model `role` has been measured."""
    return f"evaluate_{role}"


def kept_result(folder: RunFolder, role: str, now: Origin) -> dict[str, Any] | None:
    """The earlier result of the model `role`; None, reported, if it is invalid."""
    if (done := _mark(folder, get_mark(role))) is None:
        return None
    if found := differences(done.get("made_from"), now):
        say(f"evaluate: measuring {role} again: its origin has changed ({found})")
        return None
    if wrong := changed_files(folder, done.get("files", {})):
        say(
            f"evaluate: measuring {role} again: "
            f"{', '.join(f'{folder / name} is {what}' for name, what in wrong.items())}"
        )
        return None
    return done


def is_whole(folder: RunFolder, models: list[str]) -> bool:
    """Whether `models`, which have results, were evaluated together and all files are intact.

    ``metrics.json`` is rewritten if it is not; other files are reported.
    """
    if (done := _mark(folder, "evaluate")) is None or done.get("models") != models:
        return False
    wrong = changed_files(folder, done.get("files", {}))
    if METRICS in wrong:
        say(f"evaluate: {folder / METRICS} is {wrong.pop(METRICS)}; rewriting it from the results")
        rank_zero_only(write_json)(folder / METRICS, done["results"])
    for name, what in wrong.items():
        say(f"evaluate: {folder / name} is {what}; recreating it")
    return not wrong


def get_figures(done: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a model's stage file that go into ``metrics.json``."""
    return {name: value for name, value in done.items() if name not in OF_THE_MARK}


def gathered(
    folder: RunFolder,
    roles: Sequence[str],
    speed: Mapping[str, float],
    teacher_images: int | None = None,
) -> dict[str, Any]:
    """The results of all stages and of the models `roles`, for ``metrics.json``.

    Args:
        folder: The run.
        roles: Names of the measured models.
        speed: Images per second of the timed models.
        teacher_images: Images that the teacher was trained on; None: unknown.
    """
    trained = {
        stage: done
        for stage in ("learn_mask", "recover")
        if (done := folder.result(stage)) is not None
    }
    measured = {role: folder.get_result(get_mark(role)) for role in roles}
    results: dict[str, Any] = {role: get_figures(done) for role, done in measured.items()}
    for role, images_per_second in speed.items():
        results[role]["images_per_second"] = images_per_second
    results["seconds"] = {
        **{stage: done["seconds"] for stage, done in trained.items()},
        "evaluate": sum(done["seconds"] for done in measured.values()),
    }
    if runs := {
        stage: done["num_block_runs"] for stage, done in trained.items() if "num_block_runs" in done
    }:
        results["block_runs"] = runs
    images = {
        stage: done[TRAINING_IMAGES] for stage, done in trained.items() if TRAINING_IMAGES in done
    }
    if teacher_images is not None:
        images["teacher"] = teacher_images
    if images:
        results["training_images"] = images
    if others := {
        name: str(done["run_dir"])
        for name, done in {**trained, **measured}.items()
        if "run_dir" in done
    }:
        results["shared"] = others  # their seconds are those of another run
    last = next((role for role in ("recovered", "pruned") if role in results), None)
    if last is not None and "teacher" in results:
        results["speedup"] = speedup(results["teacher"], results[last])
    results["peak_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return results


def plain(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """`sampling` as plain data: a scheduler of diffusers becomes its class name and settings."""
    settings = {}
    for name, value in sampling.items():
        if hasattr(value, "config"):
            config = {key: each for key, each in value.config.items() if not key.startswith("_")}
            value = {
                "name": type(value).__name__,
                **{key: each if _is_plain(each) else str(each) for key, each in config.items()},
            }
        settings[name] = value
    return settings


def _is_plain(value: Any) -> bool:
    return (
        value is None
        or isinstance(value, (str, int))
        or (isinstance(value, float) and math.isfinite(value))
    )


def describe(model: nn.Module) -> dict[str, Any]:
    """Depth (blocks of all stacks), width (if known), parameters and checksum of a model."""
    width = getattr(model, "width", None)
    return {
        "depth": sum(len(stack) for stack in find_stacks(model).values()),
        **({} if width is None else {"width": width}),
        "num_params": sum(p.numel() for p in model.parameters()),
        "weights_sha256": tensors_sha256(model.state_dict()),
    }


def speedup(teacher: Mapping[str, Any], student: Mapping[str, Any]) -> dict[str, float]:
    """The student's speed-up in sampling.

    ``"measured"`` if both models were timed; ``"ideal"``, the ratio of depths, if their widths are
    equal.
    """
    timed = "images_per_second" in teacher and "images_per_second" in student
    found = (
        {"measured": student["images_per_second"] / teacher["images_per_second"]} if timed else {}
    )
    if student.get("width") == teacher.get("width"):
        found["ideal"] = teacher["depth"] / student["depth"]
    return found


def _mark(folder: RunFolder, stage: str) -> dict[str, Any] | None:
    try:
        return folder.result(stage)
    except Damaged as error:
        say(f"evaluate: {str(error).partition(' Delete it')[0]} Measuring again")
        return None
