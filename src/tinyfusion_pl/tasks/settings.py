"""The settings of a recipe, as a row of a table (TinyFusion, table 6)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tinyfusion_pl.artifacts import write_json
from tinyfusion_pl.report.arms import SETTINGS
from tinyfusion_pl.tasks.folder import RunFolder, say


def write_settings(
    *, run_dir: str | Path, settings: Mapping[str, Any], begin: Callable[[], None] | None = None
) -> None:
    """Write `settings`, name -> value, to the file that the table of a sweep reads.

    `begin` is called first.
    """
    if begin is not None:
        begin()
    folder = RunFolder(run_dir)
    write_json(folder / SETTINGS, dict(settings))
    say(", ".join(f"{name} {value}" for name, value in settings.items()))
