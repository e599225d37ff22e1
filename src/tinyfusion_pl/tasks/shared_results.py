"""Results that runs share: what was measured or trained of the same inputs in the same way is not done again.

A teacher is measured once for all arms of a sweep, and a choice that several criteria make is recovered once for each seed. Results
are kept beside the runs, by the checksum of everything that decides them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from tinyfusion_pl.checksums import (
    Damaged,
    Origin,
    content_sha256,
    files_sha256,
    read_sealed,
    write_sealed,
)
from tinyfusion_pl.models import library_versions
from tinyfusion_pl.tasks.folder import say


class SharedResults:
    """Results of finished stages by what they were made from.

    Args:
        folder: Where they are kept; None: nowhere, nothing is found.
        reuse: Whether to use what is there; False: results are made again, and replace it.
        settings: Checksum of the settings that decide results beside what they are made from.
    """

    def __init__(
        self, folder: str | Path | None = None, *, reuse: bool = True, settings: str = ""
    ) -> None:
        if not isinstance(reuse, bool):
            raise ValueError(f"reuse is {reuse!r}; give true or false.")
        if folder is not None and not settings:
            raise ValueError(
                "Shared results need settings=, a checksum of the settings that decide them: without it, results of other "
                "settings would be used."
            )
        self.folder, self.reuse, self.settings = (
            None if folder is None else Path(folder),
            reuse,
            settings,
        )

    def find(self, made_from: Origin) -> dict[str, Any] | None:
        """What was kept of this origin, with the entry ``"run_dir"``; None where there is none, or it is damaged (which is reported)."""
        if self.folder is None or not self.reuse or not (file := self._file(made_from)).exists():
            return None
        try:
            return read_sealed(file)["result"]
        except (Damaged, KeyError) as error:
            say(f"{file} cannot be used ({error}); the result is made again")
            return None

    def own(self, done: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """The finished result `done` of a run; None where it was another run's and that is not wanted any more."""
        return None if done is not None and "run_dir" in done and not self.reuse else done

    @rank_zero_only
    def keep(self, made_from: Origin, result: Mapping[str, Any], *, run_dir: Path) -> None:
        """Keep `result`, of the run in `run_dir`."""
        if self.folder is not None:
            content = {
                "made_from": self._shared(made_from),
                "result": {**result, "run_dir": os.path.abspath(run_dir)},
            }
            write_sealed(self._file(made_from), content)

    def _file(self, made_from: Origin) -> Path:
        return self.folder / f"{content_sha256(self._shared(made_from))[:16]}.json"

    def _shared(self, made_from: Origin) -> Origin:
        """Without the run's own configuration: other settings may lead to the same."""
        parts = {name: checksum for name, checksum in made_from.items() if name != "configuration"}
        return {
            **parts,
            "settings": self.settings,
            "versions": content_sha256(library_versions()),
            "code": _code_sha256(),
        }


@cache
def _code_sha256() -> str:
    """Of this package's sources: what a correction may change."""
    root = Path(__file__).parents[1]
    return content_sha256(
        files_sha256(root, [path.relative_to(root).as_posix() for path in root.rglob("*.py")])
    )


def copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy the files `names`, below `source`, to the same places below `target`."""
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
