"""The arms of a sweep: a record of each one, and the table of all of them when the sweep ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig


def record_arm(
    *, sweep_dir: Path, run_dir: Path, overrides: Sequence[str], error: str | None = None
) -> None:
    """Record the settings of the arm in `run_dir` and, if it failed, its error."""
    from tinyfusion_pl.artifacts import write_json  # imports torch, which --help does not need
    from tinyfusion_pl.checksums import content_sha256
    from tinyfusion_pl.report.arms import ARMS

    parsed = OverridesParser.create().parse_overrides(list(overrides))
    settings = {each.key_or_group: str(each.value()) for each in parsed if not each.is_delete()}
    where = os.path.relpath(run_dir, sweep_dir)
    # Named after the overrides: if a default has changed since, the newer run replaces the older.
    write_json(
        sweep_dir / ARMS / f"{content_sha256(settings)[:12]}.json",
        {"settings": settings, "run_dir": where, "error": error},
    )


class SweepTable(Callback):
    """Hydra callback that writes the table of a sweep's arms after the last one."""

    def on_multirun_end(self, config: DictConfig, **kwargs: object) -> None:
        """Print the table of the sweep, which `compare` also writes to its folder."""
        from tinyfusion_pl.artifacts import ArtifactError
        from tinyfusion_pl.report import NothingMeasuredError, compare

        try:
            print(compare(config.hydra.sweep.dir), flush=True)
        except NothingMeasuredError:
            return  # no arm measured anything
        except ArtifactError as error:
            print(f"error: could not write the table of the sweep: {error}", file=sys.stderr)
