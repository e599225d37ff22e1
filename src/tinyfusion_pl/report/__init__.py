"""Images, page and comparison of run folders.

Reads only files of the folder, so it works on a finished, an interrupted and a copied run.
"""

from pathlib import Path

from tinyfusion_pl.report.arms import NothingMeasured
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
    "NothingMeasured",
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
    """Two runs side by side; or, of the folder of a sweep alone, the table of its arms."""
    return compare_sweep(run_dir) if other_run_dir is None else compare_runs(run_dir, other_run_dir)
