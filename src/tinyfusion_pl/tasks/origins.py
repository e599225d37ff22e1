"""What a finished stage was made from and what it left, held against what is there now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from tinyfusion_pl.artifacts import ArtifactError
from tinyfusion_pl.checksums import (
    Origin,
    content_sha256,
    differences,
    files_sha256,
    model_sha256,
    short,
)
from tinyfusion_pl.models.records import RECORD, read_record
from tinyfusion_pl.tasks.folder import Inputs, RunFolder, say

TEACHER, SHALLOW, SAMPLES, CONFIGURATION = "teacher", "shallow", "samples", "configuration"
files_left = rank_zero_only(files_sha256)
"""`files_sha256` in the process that marks a stage as finished."""


def make_origin(folder: RunFolder, inputs: Inputs, **more: str | None) -> Origin:
    """What a training in `folder` starts from: configuration, teacher, training samples, and `more`."""
    parts = {
        CONFIGURATION: folder.configuration,
        TEACHER: model_sha256(inputs.teacher),
        SAMPLES: inputs.data.samples_sha256(),
        **more,
    }
    return {name: checksum for name, checksum in parts.items() if checksum is not None}


def shallow_sha256(path: Path) -> str:
    """The checksum of the shallow model in folder `path`: of its weights, as its record has it, and of the kept blocks."""
    record = read_record(path, decided=True)
    return content_sha256({"weights": record["weights"]["sha256"], "stacks": record["stacks"]})


def check_origin(
    folder: RunFolder,
    stage: str,
    done: Mapping[str, Any],
    now: Origin,
    *,
    of: Sequence[str] | None = None,
) -> None:
    """Refuse to build on the finished `stage`, which left `done`, where it was made from something else than is there now.

    Raises:
        ArtifactError: names what differs with both checksums.
    """
    if found := differences(done.get("made_from"), now, of=of):
        raise ArtifactError(
            f"{stage} in {folder.path} was made from something else than is there now ({found}). What is made of both "
            "would belong to neither. Put back what it was made from, or give another run_dir=PATH."
        )


def check_asked(
    folder: RunFolder, stage: str, done: Mapping[str, Any], asked: Mapping[str, int]
) -> None:
    """Refuse the finished `stage`, which left `done`, where `asked` (steps, seed) is another: it was not trained so.

    Raises:
        ArtifactError: names what differs.
    """
    if found := [
        f"{name} {done[name]} then, {value} now"
        for name, value in asked.items()
        if done.get(name, value) != value
    ]:
        raise ArtifactError(
            f"{stage} in {folder.path} was finished with other settings ({', '.join(found)}). Give another run_dir=PATH."
        )


def missing_files(
    folder: RunFolder, stage: str, done: Mapping[str, Any], *, below: str = ""
) -> list[str]:
    """Files that the finished `stage` left below the folder `below` and that are gone; the others are verified.

    Raises:
        ArtifactError: when one is not what the stage left.
    """
    expected = {
        name: checksum for name, checksum in done.get("files", {}).items() if name.startswith(below)
    }
    found = files_sha256(folder.path, list(expected))
    if differing := [name for name in found if found[name] != expected[name]]:
        named = ", ".join(
            f"{folder / name} (checksum {short(expected[name])} then, {short(found[name])} now)"
            for name in differing[:3]
        )
        raise ArtifactError(
            f"{named}: not what {stage} left there: damaged, or replaced. Put it back; or delete it, and rerun "
            f"task={stage}: it is made again from the stage's last checkpoint."
        )
    return [name for name in expected if name not in found]


def needs_remaking(
    folder: RunFolder, stage: str, done: Mapping[str, Any], *, below: str, repeats: bool = False
) -> bool:
    """Whether the finished `stage` has to make its model in the folder `below` again, from its last checkpoint; says so.

    With `repeats`, it has none and does its work again, to the same result.

    Raises:
        ArtifactError: when a file is not what the stage left, or one is gone and so is the checkpoint.
    """
    if not (missing := missing_files(folder, stage, done, below=below)):
        return False
    what = f"{', '.join(missing[:3])} {'are' if len(missing) > 1 else 'is'} gone from {folder.path}, though {stage} was finished"
    if repeats:
        say(f"{stage}: {what}: it is made again")
        return True
    if not folder.checkpoint(stage).exists():
        raise ArtifactError(
            f"{what}, and so is its last checkpoint. Put it back; or delete {folder / 'stages' / stage}.json, and {stage} "
            "begins anew."
        )
    say(f"{stage}: {what}: it is made again from {folder.checkpoint(stage)}")
    return True


def changed_files(folder: RunFolder, expected: Mapping[str, str]) -> dict[str, str]:
    """Files of `expected` (name -> checksum) that are not what they were -> ``"gone"`` or ``"changed or damaged"``."""
    found = files_sha256(folder.path, list(expected))
    return {
        name: "changed or damaged" if name in found else "gone"
        for name in expected
        if found.get(name) != expected[name]
    }


def get_log_dir(stage: str) -> str:
    """What `csv_logger` leaves of `stage`."""
    return f"logs/{stage}/metrics.csv"


def check_logs(folder: RunFolder, stage: str, done: Mapping[str, Any]) -> None:
    """Say where a log of the finished `stage`, which only the report reads, is not what the stage left."""
    for name, what in changed_files(folder, done.get("logs", {})).items():
        say(
            f"{stage}: {folder / name} is {what} since the stage finished: the report may show other curves than there were"
        )


def check_own_models(folder: RunFolder, inputs: Inputs) -> None:
    """Verify what the finished stages left, and that they are of this teacher and of each other; say which model is gone.

    Raises:
        ArtifactError: when they are not.
    """
    stages = {"learn_mask": ("pruned", folder.shallow), "recover": ("recovered", folder.recovered)}
    for stage, (role, path) in stages.items():
        if (done := folder.result(stage)) is None:
            continue
        check_origin(folder, stage, done, {TEACHER: model_sha256(inputs.teacher)})
        if missing := missing_files(folder, stage, done, below=path.name):
            say(
                f"evaluate: {', '.join(missing[:3])} gone from {folder.path}, though {stage} was finished; task={stage} makes it again"
                + ("" if (path / RECORD).exists() else f". There is no {role} model to measure")
            )
        elif stage == "recover" and (folder.shallow / RECORD).exists():
            check_origin(folder, stage, done, {SHALLOW: shallow_sha256(folder.shallow)})
