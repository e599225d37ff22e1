"""Labels, explanations and number formats of the page, the figures and the comparison."""

from __future__ import annotations

import math
from typing import Any

from tinyfusion_pl.report.reading import models_in, numbers

METRICS = {
    "depth": ("blocks", "number of transformer blocks"),
    "width": ("channels", "width of the hidden states"),
    "num_params": ("parameters", "number of learned weights"),
    "fid": (
        "FID",
        "Fréchet distance between features of generated and real images; lower is better",
    ),
    "sfid": ("sFID", "FID of spatial features; lower is better"),
    "inception_score": (
        "Inception score",
        "confidence and diversity of a classifier's predictions on the samples; higher is better",
    ),
    "precision": (
        "precision",
        "fraction of samples within the distribution of real images; higher is better",
    ),
    "recall": (
        "recall",
        "fraction of real images within the distribution of samples; higher is better",
    ),
    "accuracy": (
        "accuracy",
        "fraction of samples that a classifier assigns to their label; higher is better",
    ),
    "calibration_loss": (
        "loss on fixed draws",
        "loss on fixed noise and timesteps of the training data; lower is better",
    ),
    "teacher_distance": (
        "distance to the teacher",
        "mean squared error to the teacher's output on fixed draws; lower is better",
    ),
    "images_per_second": (
        "images/s",
        "images sampled per second, all models timed alternately in one run; higher is better",
    ),
}
"""Key in metrics.json -> label and explanation. An unknown key is its own label."""

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
        "learns which blocks to remove while the weights adapt",
    ),
    "recover": ("recovery", "trains the pruned model on the data and its teacher"),
    "evaluate": ("evaluation", "samples images from each model and measures quality and speed"),
}


def label(key: str) -> str:
    """Label of a metric."""
    return METRICS.get(key, (key, ""))[0]


def stage_label(stage: str) -> str:
    """Label of a stage."""
    return STAGES.get(stage, (stage.replace("_", " "), ""))[0]


def metric_keys(*sections: dict[str, Any]) -> list[str]:
    """The numeric keys of all sections: known ones in the order of `METRICS`, then the others."""
    found = dict.fromkeys(key for section in sections for key in numbers(section))
    return [key for key in METRICS if key in found] + [key for key in found if key not in METRICS]


def value(key: str, number: float | None) -> str:
    """A formatted metric: ``1,234,567`` parameters, 97.5%, 9.23."""
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
    """The final shallow model of a run: recovered, else pruned."""
    return next((model for model in ("recovered", "pruned") if numbers(metrics.get(model))), None)


def headline(metrics: dict[str, Any]) -> str:
    """The measured results of a run in one line.

    ``12 → 6 blocks: 1.93x faster sampling (ideal 2.00x), FID 9.2 → 12.0, accuracy 98.0% → 96.1%``
    """
    student = get_student(metrics)
    if student is None:
        present = [model for model in models_in(metrics) if numbers(metrics.get(model))]
        if not present:
            return "Nothing has been measured yet"
        verb = "has" if len(present) == 1 else "have"
        return f"Only the {' and the '.join(present)} {verb} been measured"
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
    """Which features FID was computed with, and what it can be compared with."""
    network = protocol.get("feature_network")
    if not network:
        return (
            "FID is a Fréchet distance, but the run does not record in which features: do not "
            "compare it with other values."
        )
    if str(network).startswith("Random"):
        return (
            f"FID uses features of a randomly initialized network ({network}), which only serves "
            "dry runs: the quality values here are meaningless."
        )
    if "inception" in str(network).lower():
        return f"FID uses features of the Inception network ({network}), as published values do."
    return (
        f"FID uses features of “{network}”, not of the Inception network: compare it between runs "
        "of this project with the same protocol, never with published FID values."
    )
