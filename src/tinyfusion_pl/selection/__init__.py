"""Which blocks stay, by any criterion: from (model, samples, budget) to a decision."""

from tinyfusion_pl.selection.calibration import Calibration
from tinyfusion_pl.selection.problem import Choice, Criterion, Problem
from tinyfusion_pl.selection.select import CRITERIA, Selected, Selection, select_blocks
from tinyfusion_pl.selection.space import Space
from tinyfusion_pl.selection.trials import Trials
from tinyfusion_pl.selection.width import WidthPruning

__all__ = [
    "CRITERIA",
    "Calibration",
    "Choice",
    "Criterion",
    "Problem",
    "Selected",
    "Selection",
    "Space",
    "Trials",
    "WidthPruning",
    "select_blocks",
]
