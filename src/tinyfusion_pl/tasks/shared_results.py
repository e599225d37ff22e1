"""Results that runs share, so that the same inputs are not measured or trained twice.

A teacher is measured once for all arms of a sweep, and a selection that several criteria make is
recovered once per seed. Results are saved beside the runs, under the checksum of their origin.
"""

from __future__ import annotations

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
    """Results of finished stages by origin.

    Args:
        folder: Folder of the results; None disables sharing.
        reuse: Whether to reuse results; if False, new ones replace them.
        settings: Checksum of the settings that results depend on besides their origin.
    """

    def __init__(
        self, folder: str | Path | None = None, *, reuse: bool = True, settings: str = ""
    ) -> None:
        if not isinstance(reuse, bool):
            raise ValueError(f"reuse is {reuse!r}; give true or false.")
        if folder is not None and not settings:
            raise ValueError(
                "Shared results need settings=, a checksum of the settings that they depend on: "
                "without it, results of other settings would be reused."
            )
        self.folder, self.reuse, self.settings = (
            None if folder is None else Path(folder),
            reuse,
            settings,
        )

    def find(self, made_from: Origin) -> dict[str, Any] | None:
        """The result of this origin, with its ``"run_dir"``; None if it is missing or damaged."""
        if self.folder is None or not self.reuse or not (file := self._file(made_from)).exists():
            return None
        try:
            return read_sealed(file)["result"]
        except (Damaged, KeyError) as error:
            say(f"{file} cannot be reused ({error}); computing the result again")
            return None

    def own(self, done: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """The finished result `done`; None if it came from another run and `reuse` is off."""
        return None if done is not None and "run_dir" in done and not self.reuse else done

    @rank_zero_only
    def keep(self, made_from: Origin, result: Mapping[str, Any], *, run_dir: Path) -> None:
        """Save `result` of the run in `run_dir`."""
        if self.folder is not None:
            content = {
                "made_from": self._shared(made_from),
                "result": {**result, "run_dir": str(Path(run_dir).absolute())},
            }
            write_sealed(self._file(made_from), content)

    def _file(self, made_from: Origin) -> Path:
        assert self.folder is not None
        return self.folder / f"{content_sha256(self._shared(made_from))[:16]}.json"

    def _shared(self, made_from: Origin) -> Origin:
        """The origin without the run's configuration: other settings may give the same result."""
        parts = {name: checksum for name, checksum in made_from.items() if name != "configuration"}
        return {
            **parts,
            "settings": self.settings,
            "versions": content_sha256(library_versions()),
            "code": _code_sha256(),
        }


@cache
def _code_sha256() -> str:
    """Checksum of this package's sources: a bug fix may change results."""
    root = Path(__file__).parents[1]
    return content_sha256(
        files_sha256(root, [path.relative_to(root).as_posix() for path in root.rglob("*.py")])
    )


def copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy the files `names`, below `source`, to the same places below `target`."""
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
