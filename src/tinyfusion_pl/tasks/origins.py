"""Checks of finished stages: their origins and files against the current ones."""

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
    """Origin of a training: configuration, teacher, training samples, and `more`."""
    parts = {
        CONFIGURATION: folder.configuration,
        TEACHER: model_sha256(inputs.teacher),
        SAMPLES: inputs.data.samples_sha256(),
        **more,
    }
    return {name: checksum for name, checksum in parts.items() if checksum is not None}


def shallow_sha256(path: Path) -> str:
    """Checksum of the shallow model in `path`, of recorded weights and kept blocks."""
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
    """Check that the origin of the finished `stage`, whose result is `done`, is the current one.

    Raises:
        ArtifactError: if it is not; names the differences with both checksums.
    """
    if found := differences(done.get("made_from"), now, of=of):
        raise ArtifactError(
            f"{stage} in {folder.path} has another origin ({found}): its inputs have changed "
            "since. Restore them, or give another run_dir=PATH."
        )


def check_asked(
    folder: RunFolder, stage: str, done: Mapping[str, Any], asked: Mapping[str, int]
) -> None:
    """Check that `stage`, whose result is `done`, was trained as `asked` (steps, seed).

    Raises:
        ArtifactError: if it was not; names the differences.
    """
    if found := [
        f"{name} {done[name]} then, {value} now"
        for name, value in asked.items()
        if done.get(name, value) != value
    ]:
        raise ArtifactError(
            f"{stage} in {folder.path} was finished with other settings ({', '.join(found)}). Give "
            "another run_dir=PATH."
        )


def missing_files(
    folder: RunFolder, stage: str, done: Mapping[str, Any], *, below: str = ""
) -> list[str]:
    """Missing files of the finished `stage` in the folder `below`; the others are verified.

    Raises:
        ArtifactError: if a file does not match its checksum.
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
            f"{named}: damaged or replaced since {stage} wrote it. Restore it; or delete it and "
            f"rerun task={stage}, which recreates it from the stage's last checkpoint."
        )
    return [name for name in expected if name not in found]


def needs_remaking(
    folder: RunFolder, stage: str, done: Mapping[str, Any], *, below: str, repeats: bool = False
) -> bool:
    """Whether the finished `stage` must recreate its model in the folder `below`; reports it if so.

    It does so from its last checkpoint, or with `repeats`, where there is none, by running again.

    Raises:
        ArtifactError: if a file does not match its checksum, or a file and the checkpoint are
        missing.
    """
    if not (missing := missing_files(folder, stage, done, below=below)):
        return False
    verb = "are" if len(missing) > 1 else "is"
    what = (
        f"{', '.join(missing[:3])} {verb} missing from {folder.path}, although {stage} was finished"
    )
    if repeats:
        say(f"{stage}: {what}; running it again")
        return True
    if not folder.checkpoint(stage).exists():
        raise ArtifactError(
            f"{what}, and so is its last checkpoint. Restore it; or delete "
            f"{folder / 'stages' / stage}.json to run {stage} again."
        )
    say(f"{stage}: {what}; recreating it from {folder.checkpoint(stage)}")
    return True


def changed_files(folder: RunFolder, expected: Mapping[str, str]) -> dict[str, str]:
    """Files of `expected` that differ: name -> ``"missing"`` or ``"changed or damaged"``."""
    found = files_sha256(folder.path, list(expected))
    return {
        name: "changed or damaged" if name in found else "missing"
        for name in expected
        if found.get(name) != expected[name]
    }


def get_log_dir(stage: str) -> str:
    """The file that `csv_logger` writes for `stage`."""
    return f"logs/{stage}/metrics.csv"


def check_logs(folder: RunFolder, stage: str, done: Mapping[str, Any]) -> None:
    """Report logs of the finished `stage` that are missing or changed."""
    for name, what in changed_files(folder, done.get("logs", {})).items():
        say(
            f"{stage}: {folder / name} is {what} since the stage finished: the curves in the "
            "report may be wrong"
        )


def check_own_models(folder: RunFolder, inputs: Inputs) -> None:
    """Verify that the models of the finished stages belong to this teacher and to each other.

    A missing model is reported.

    Raises:
        ArtifactError: if they do not.
    """
    stages = {"learn_mask": ("pruned", folder.shallow), "recover": ("recovered", folder.recovered)}
    for stage, (role, path) in stages.items():
        if (done := folder.result(stage)) is None:
            continue
        check_origin(folder, stage, done, {TEACHER: model_sha256(inputs.teacher)})
        if missing := missing_files(folder, stage, done, below=path.name):
            say(
                f"evaluate: {', '.join(missing[:3])} missing from {folder.path}, although {stage} "
                f"was finished; rerun task={stage} to recreate it"
                + ("" if (path / RECORD).exists() else f". The {role} model is not measured")
            )
        elif stage == "recover" and (folder.shallow / RECORD).exists():
            check_origin(folder, stage, done, {SHALLOW: shallow_sha256(folder.shallow)})
