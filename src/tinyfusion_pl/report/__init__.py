"""Reports, figures and comparisons of run folders.

Reads only the files of a folder, so it works for finished, interrupted and copied runs.
"""

import warnings
from pathlib import Path
from typing import Any

from tinyfusion_pl.report.arms import NothingMeasuredError
from tinyfusion_pl.report.compare import compare_runs
from tinyfusion_pl.report.grid import write_grid
from tinyfusion_pl.report.page import write_figures, write_report
from tinyfusion_pl.report.sweep import compare_sweep
from tinyfusion_pl.report.sweep_figures import (
    write_activations,
    write_candidate_losses,
    write_depth_curve,
)
from tinyfusion_pl.report.words import headline

__all__ = [
    "NothingMeasuredError",
    "compare",
    "compare_runs",
    "compare_sweep",
    "headline",
    "write_activations",
    "write_candidate_losses",
    "write_depth_curve",
    "write_figures",
    "write_grid",
    "write_report",
]


def compare(run_dir: str | Path, other_run_dir: str | Path | None = None) -> str:
    """Compare two runs, or the arms of a sweep.

    Args:
        run_dir: A run folder, or the folder of a sweep.
        other_run_dir: Another run folder; None for a sweep.

    Returns:
        The comparison as text.
    """
    return compare_sweep(run_dir) if other_run_dir is None else compare_runs(run_dir, other_run_dir)


def __getattr__(name: str) -> Any:
    if name == "NothingMeasured":
        warnings.warn(
            "tinyfusion_pl.report.NothingMeasured is deprecated; use NothingMeasuredError.",
            DeprecationWarning,
            stacklevel=2,
        )
        return NothingMeasuredError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
