"""How page, figures and comparison name and write values: labels, explanations, number formats."""

from __future__ import annotations

import math
from typing import Any

from .reading import models_in, numbers

METRICS = {
    "depth": ("blocks", "transformer blocks that run one after another"),
    "width": ("channels", "width of the hidden states that go from block to block"),
    "num_params": ("parameters", "learned numbers in the network"),
    "fid": (
        "FID",
        "distance between the statistics of generated and real images; lower is better, 0 is equal",
    ),
    "sfid": ("sFID", "the same of spatial features, which see where things are; lower is better"),
    "inception_score": (
        "Inception score",
        "how certain and how varied the classifier finds the samples; higher is better",
    ),
    "precision": (
        "precision",
        "share of samples that lie among the real images; higher is better",
    ),
    "recall": ("recall", "share of real images that lie among the samples; higher is better"),
    "accuracy": (
        "accuracy",
        "share of samples in which the classifier sees the class that was asked for; higher is better",
    ),
    "calibration_loss": (
        "loss on fixed draws",
        "the objective's loss on fixed draws of the training data; lower is better",
    ),
    "teacher_distance": (
        "distance to the teacher",
        "mean squared difference to the teacher's output on fixed draws; lower is better",
    ),
    "images_per_second": (
        "images/s",
        "images sampled per second, the models timed in turn in this run; higher is better",
    ),
}
"""Key in metrics.json -> label and explanation; a key that is not here is its own label."""

CURVES = {
    "train/loss": "loss",
    "search/loss": "log of the distance to the teacher",
    "train/loss_kd": "output distillation",
    "train/loss_feature": "feature distillation",
    "gates/tau": "gate temperature",
    "gates/confidence": "gate confidence",
    "gates/entropy": "gate entropy (nats)",
}
"""Log key -> what the curve shows."""

STAGES = {
    "learn_mask": (
        "mask learning",
        "learns which blocks can go, while the weights learn to do without them",
    ),
    "recover": ("recovery", "trains what stayed to make up for what left, guided by the teacher"),
    "evaluate": ("evaluation", "samples images from each model, measures and times them"),
}


def label(key: str) -> str:
    return METRICS.get(key, (key, ""))[0]


def stage_label(stage: str) -> str:
    return STAGES.get(stage, (stage.replace("_", " "), ""))[0]


def metric_keys(*sections: dict[str, Any]) -> list[str]:
    """The numeric keys of all sections: the known ones in their order, then the others as they come."""
    found = dict.fromkeys(key for section in sections for key in numbers(section))
    return [key for key in METRICS if key in found] + [key for key in found if key not in METRICS]


def value(key: str, number: float | None) -> str:
    """A metric as a person writes it: ``1,234,567`` parameters, 97.5%, 9.23."""
    if number is None:
        return "—"
    if not math.isfinite(number):
        return str(number)
    if key == "accuracy":
        return f"{100 * number:.1f}%"
    if key == "share":
        return f"{100 * number:.3g}%"
    if isinstance(number, int) or key in ("depth", "width", "num_params"):
        return f"{number:,.0f}"
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.4g}"


def difference(key: str, a: float, b: float) -> str:
    """``b - a`` with its sign, in the unit of `value`."""
    if key == "accuracy":
        return f"{100 * (b - a):+.1f} pp"
    change = b - a
    if isinstance(change, int):
        return f"{change:+,d}"
    return f"{change:+,.0f}" if abs(change) >= 1000 else f"{change:+.4g}"


def duration(seconds: float) -> str:
    """``42 s``, ``3 min 05 s``, ``2 h 10 min``."""
    if not math.isfinite(seconds):
        return str(seconds)
    if seconds < 59.5:
        return f"{seconds:.2g} s" if seconds < 9.5 else f"{seconds:.0f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def get_student(metrics: dict[str, Any]) -> str | None:
    """The shallow model that the run ends with: recovered, else pruned."""
    return next((model for model in ("recovered", "pruned") if numbers(metrics.get(model))), None)


def headline(metrics: dict[str, Any]) -> str:
    """The run in a sentence, as far as it was measured.

    ``12 → 6 blocks: 1.93x faster sampling (ideal 2.00x), FID 9.2 → 12.0, accuracy 98.0% → 96.1%``
    """
    student = get_student(metrics)
    if student is None:
        present = [model for model in models_in(metrics) if numbers(metrics.get(model))]
        verb = "was" if len(present) == 1 else "were"
        return (
            f"Only the {' and the '.join(present)} {verb} measured"
            if present
            else "Nothing was measured yet"
        )
    before, after = numbers(metrics.get("teacher")), numbers(metrics[student])

    def change(key: str, form: str) -> str | None:
        if key not in after:
            return None
        return (
            f"{form.format(before[key])} → {form.format(after[key])}"
            if key in before
            else form.format(after[key])
        )

    facts = []
    speedup = numbers(metrics.get("speedup"))
    if "measured" in speedup:
        ideal = f" (ideal {speedup['ideal']:.2f}x)" if "ideal" in speedup else ""
        facts.append(f"{speedup['measured']:.2f}x faster sampling{ideal}")
    facts += [f"FID {fid}" for fid in [change("fid", "{:.1f}")] if fid]
    facts += [f"accuracy {accuracy}" for accuracy in [change("accuracy", "{:.1%}")] if accuracy]
    depth = change("depth", "{:.0f}")
    subject = f"{depth} blocks" if depth else "Shallow model"
    if before.get("width", after.get("width")) != after.get("width"):
        narrower = f"{change('width', '{:.0f}')} channels"
        subject = (
            narrower if before.get("depth") == after.get("depth") else f"{subject}, {narrower}"
        )
    subject += " (before recovery)" if student == "pruned" else ""
    return f"{subject}: {', '.join(facts)}" if facts else subject


def feature_note(protocol: dict[str, Any]) -> str:
    """Plainly: in whose features the Fréchet distance was taken, and what it may be compared with."""
    network = protocol.get("feature_network")
    if not network:
        return "FID is a Fréchet distance; the run does not say in whose features, so compare it with nothing."
    if str(network).startswith("Random"):
        return (
            f"FID was taken in features of a randomly initialised network ({network}): it tries the run out, and no figure here means "
            "anything."
        )
    if "inception" in str(network).lower():
        return f"FID is the Fréchet distance between features of the Inception network ({network}), the usual one."
    return (
        f"FID here is the Fréchet distance between features of “{network}”, not of the Inception network: "
        "compare it between runs of this project that share the protocol, never with FID figures published elsewhere."
    )
