"""Lightning callbacks for depth pruning, distillation, evaluation and progress."""

from tinyfusion_pl.callbacks.clock import Clock
from tinyfusion_pl.callbacks.depth_pruning import DepthPruningCallback
from tinyfusion_pl.callbacks.distillation import DistillationCallback
from tinyfusion_pl.callbacks.ema import EMAWithWarmup
from tinyfusion_pl.callbacks.evaluation import EvaluationCallback
from tinyfusion_pl.callbacks.gate_monitor import gate_metrics
from tinyfusion_pl.callbacks.nonfinite import NonFiniteGuard
from tinyfusion_pl.callbacks.progress import SamplingProgressBar, StepProgressBar

__all__ = [
    "Clock",
    "DepthPruningCallback",
    "DistillationCallback",
    "EMAWithWarmup",
    "EvaluationCallback",
    "NonFiniteGuard",
    "SamplingProgressBar",
    "StepProgressBar",
    "gate_metrics",
]
