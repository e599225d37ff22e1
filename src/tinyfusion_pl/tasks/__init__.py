"""Tasks of the command line: resumable callables, each in a run folder."""

import warnings
from typing import Any

from tinyfusion_pl.tasks.activations import Activations, draw_activations
from tinyfusion_pl.tasks.budget import Budget
from tinyfusion_pl.tasks.candidate_losses import CandidateLosses, score_candidates
from tinyfusion_pl.tasks.depth_curve import DepthCurve, measure_depths
from tinyfusion_pl.tasks.evaluate import Evaluate
from tinyfusion_pl.tasks.extract import Extract, extract_latents
from tinyfusion_pl.tasks.fitting import Fit
from tinyfusion_pl.tasks.folder import Inputs, RunFolder
from tinyfusion_pl.tasks.learn_mask import LearnMask
from tinyfusion_pl.tasks.loggers import csv_logger
from tinyfusion_pl.tasks.measure import ImageFiles, make_reference, measure
from tinyfusion_pl.tasks.recover import Recover
from tinyfusion_pl.tasks.report import Report
from tinyfusion_pl.tasks.settings import write_settings
from tinyfusion_pl.tasks.shared_results import SharedResults
from tinyfusion_pl.tasks.stages import Pipeline
from tinyfusion_pl.tasks.steps import UnfinishedError
from tinyfusion_pl.tasks.tensorboard_tracker import TensorBoardTracker
from tinyfusion_pl.tasks.tracking import Tracker
from tinyfusion_pl.tasks.train import Train, train_denoiser
from tinyfusion_pl.tasks.wandb_tracker import WandbTracker

__all__ = [
    "Activations",
    "Budget",
    "CandidateLosses",
    "DepthCurve",
    "Evaluate",
    "Extract",
    "Fit",
    "ImageFiles",
    "Inputs",
    "LearnMask",
    "Pipeline",
    "Recover",
    "Report",
    "RunFolder",
    "SharedResults",
    "TensorBoardTracker",
    "Tracker",
    "Train",
    "UnfinishedError",
    "WandbTracker",
    "csv_logger",
    "draw_activations",
    "extract_latents",
    "make_reference",
    "measure",
    "measure_depths",
    "score_candidates",
    "train_denoiser",
    "write_settings",
]

_RENAMED = {"PictureFiles": "ImageFiles", "Unfinished": "UnfinishedError"}  # for one release


def __getattr__(name: str) -> Any:
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        f"tinyfusion_pl.tasks.{name} was renamed to {_RENAMED[name]}. The old name will be removed "
        "in the next release.",
        DeprecationWarning,
        stacklevel=2,
    )
    return globals()[_RENAMED[name]]
