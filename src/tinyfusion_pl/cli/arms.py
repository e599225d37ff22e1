"""What a sweep set for each of its arms, recorded beside them, and the table of all at its end."""

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
    """Leave what was set for the arm in `run_dir`, and why it failed, where it did."""
    from tinyfusion_pl.artifacts import write_json  # imports torch, which --help does not need
    from tinyfusion_pl.checksums import content_sha256
    from tinyfusion_pl.report.arms import ARMS

    parsed = OverridesParser.create().parse_overrides(list(overrides))
    settings = {each.key_or_group: str(each.value()) for each in parsed if not each.is_delete()}
    where = os.path.relpath(run_dir, sweep_dir)
    # By what was set: where a default has changed since, the newer run takes the place of the older.
    write_json(
        sweep_dir / ARMS / f"{content_sha256(settings)[:12]}.json",
        {"settings": settings, "run_dir": where, "error": error},
    )


class SweepTable(Callback):
    """Writes the table of a sweep's arms when its last one has ended (Hydra calls it)."""

    def on_multirun_end(self, config: DictConfig, **kwargs: object) -> None:
        from tinyfusion_pl.artifacts import ArtifactError
        from tinyfusion_pl.report import NothingMeasuredError, compare

        try:
            print(compare(config.hydra.sweep.dir), flush=True)
        except NothingMeasuredError:
            return  # no arm was one that is measured
        except ArtifactError as error:
            print(f"error: no table was made: {error}", file=sys.stderr)
