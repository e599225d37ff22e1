"""A run folder as the tasks write it, invented but realistic.

Digits for images, gates that become sure, losses that fall, one resumption.
"""

from __future__ import annotations

import csv
import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from sklearn.datasets import load_digits

PROTOCOL = {
    "num_samples": 1000,
    "num_reference": 1797,
    "sampler": "ddim",
    "num_sampling_steps": 50,
    "guidance_scale": 1.5,
    "guidance_channels": None,
    "weights": "ema",
    "feature_network": "digits_classifier",
    "labels": "balanced",
    "seed": 0,
}


def fake_metrics(depth: int = 12, kept: int = 6) -> dict:
    return {
        "name": "digits_d6",
        "teacher": {
            "depth": depth,
            "num_params": 1_012_345,
            "fid": 9.2134,
            "inception_score": 9.41,
            "accuracy": 0.979,
            "images_per_second": 410.2,
        },
        "pruned": {
            "depth": kept,
            "num_params": 523_456,
            "fid": 1069.3,
            "inception_score": 2.13,
            "accuracy": 0.187,
            "images_per_second": 790.8,
        },
        "recovered": {
            "depth": kept,
            "num_params": 523_456,
            "fid": 12.04,
            "inception_score": 9.02,
            "accuracy": 0.961,
            "images_per_second": 791.7,
        },
        "seconds": {"learn_mask": 71.2, "recover": 93.4, "evaluate": 41.8},
        "peak_memory_mib": 1123.4,
        "speedup": {"measured": 1.93, "ideal": depth / kept},
        "protocol": dict(PROTOCOL),
    }


def fake_decisions(
    patterns: dict[str, list[tuple[int, int]]], *, num_steps: int, every: int
) -> list[dict]:
    """Entries of decisions.jsonl: each group's candidates start equal and drift towards one."""
    rng = np.random.default_rng(0)
    groups = {
        path: [(n, m, np.array(list(combinations(range(m), n)))) for n, m in pattern]
        for path, pattern in patterns.items()
    }
    goals = {
        path: [rng.normal(0, 1, len(candidates)) for _, _, candidates in own]
        for path, own in groups.items()
    }
    entries = []
    for step in range(0, num_steps + 1, every):
        progress = step / num_steps
        stacks = {}
        for path, own in groups.items():
            stack = {"kept_blocks": [], "block_probabilities": [], "groups": []}
            for (n, m, candidates), goal in zip(own, goals[path], strict=True):
                start = len(stack["block_probabilities"])
                logits = progress * goal * 5 + rng.normal(0, 0.25 * (1 - progress), len(goal))
                p = np.exp(logits - logits.max())
                p /= p.sum()
                mask = np.zeros((len(candidates), m))
                np.put_along_axis(mask, candidates, 1, axis=1)
                stack["kept_blocks"] += [int(start + b) for b in candidates[p.argmax()]]
                stack["block_probabilities"] += (p @ mask).tolist()
                entropy = float(-(p * np.log(p + 1e-12)).sum())
                stack["groups"].append(
                    {
                        "start": start,
                        "num_kept": n,
                        "num_blocks": m,
                        "confidence": float(p.max()),
                        "entropy": entropy,
                    }
                )
            stacks[path] = stack
        entries.append(
            {"step": step, "tau": 4 - 3.9 * progress, "scaling": 100.0, "stacks": stacks}
        )
    return entries


def write_csv(path: Path, columns: list[str], rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def _fake_logs(folder: Path) -> None:
    rng = np.random.default_rng(1)

    def falling(step: int, scale: float) -> float:
        return float(scale * (0.2 + np.exp(-step / 150)) * rng.lognormal(0, 0.15))

    learn = [
        {
            "step": s,
            "train/loss": falling(s, 0.6),
            "gates/tau": 4 - 3.9 * s / 500,
            "gates/confidence": 0.5 + s / 1200,
            "gates/entropy": 0.69 - s / 1000,
        }
        for s in range(0, 500, 5)
    ]
    write_csv(folder / "learn_mask/version_0/metrics.csv", ["epoch", *learn[0]], learn)
    columns = ["epoch", "step", "train/loss", "train/loss_kd", "train/loss_feature"]
    recover = [
        {
            "step": s,
            "train/loss": falling(s, 1.1),
            "train/loss_kd": falling(s, 0.9),
            "train/loss_feature": falling(s, 90),
        }
        for s in range(0, 700, 5)
    ]
    write_csv(folder / "recover/version_0/metrics.csv", columns, recover[:90])
    write_csv(folder / "recover/version_1/metrics.csv", columns, recover[80:])


def _fake_samples(path: Path, *, draws: int) -> None:
    rng = np.random.default_rng(2)
    digits = load_digits()
    labels = np.tile(np.arange(10), draws)
    images = (
        np.stack(
            [digits.images[rng.choice(np.flatnonzero(digits.target == label))] for label in labels]
        )[:, None]
        * 255
        / 16
    )

    def damaged(noise: float, mix: float) -> np.ndarray:
        blurred = (np.roll(images, 1, -1) + np.roll(images, -1, -2)) / 2
        noisy = (1 - mix) * images + mix * blurred + rng.normal(0, noise, images.shape)
        return noisy.clip(0, 255).astype(np.uint8)

    save_file(
        {
            "labels": labels,
            "teacher": damaged(4, 0),
            "pruned": damaged(80, 0.8),
            "recovered": damaged(14, 0.12),
        },
        path,
    )


def make_run(
    folder: Path,
    *,
    patterns: dict[str, list[tuple[int, int]]] | None = None,
    num_steps: int = 500,
    every: int = 10,
    draws: int = 2,
) -> Path:
    """Write a run folder; `patterns` has (num_kept, num_blocks) of each group by stack path."""
    patterns = patterns or {"blocks": [(1, 2)] * 6}
    for part in ("learn_mask", "shallow"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    depth, kept = (
        sum(group[i] for pattern in patterns.values() for group in pattern) for i in (1, 0)
    )
    (folder / "metrics.json").write_text(json.dumps(fake_metrics(depth, kept)))
    (folder / "config.yaml").write_text(
        'name: digits_d6\nseed: 0\npruning:\n  pattern: "1:2"\n  scaling: 100.0\n'
    )
    entries = fake_decisions(patterns, num_steps=num_steps, every=every)
    half = len(entries) // 2
    lines = [
        json.dumps(entry) for entry in [*entries[:half], *entries[half - 2 :]]
    ]  # resumed: two steps stand twice
    (folder / "learn_mask/decisions.jsonl").write_text("\n".join(lines) + "\n")
    record = {
        path: {
            "pattern": "+".join(f"{n}:{m}" for n, m in dict.fromkeys(patterns[path])),
            "num_blocks": sum(m for _, m in patterns[path]),
            "kept_blocks": stack["kept_blocks"],
            "groups": stack["groups"],
        }
        for path, stack in entries[-1]["stacks"].items()
    }
    source = {"path": "assets/dit_digits/model.safetensors", "sha256": "ab" * 32}
    (folder / "shallow/record.json").write_text(
        json.dumps({"stacks": record, "source": source, "delta_w": "discard", "seed": 0})
    )
    _fake_logs(folder / "logs")
    _fake_samples(folder / "samples.safetensors", draws=draws)
    return folder


@pytest.fixture
def new_run(tmp_path):
    """`new_run(**options)` writes a run folder and gives its path; `name` sets several apart."""
    return lambda name="run", **options: make_run(tmp_path / name, **options)
