"""Measure the sampling speed of D28, D19, D14 and D7 against the ideal speed-up by depth.

All depths take turns in this process, so ratios do not depend on the load of the machine. Only the
depth differs: weights are random, and quality is not measured.

    python benchmarks/sampling.py [--width 1152] [--input-size 32] [--batch-size 1] [--steps 1]
        [--rounds 3] [--figure PATH]
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from tinyfusion_pl import create_model
from tinyfusion_pl.objectives import GaussianDiffusion
from tinyfusion_pl.report.sweep_figures import write_speedup


def measure(args: argparse.Namespace) -> dict[int, float]:
    """Depth -> median seconds of sampling a batch, with guidance."""
    objective, device = GaussianDiffusion(), torch.device(args.device)
    models = {
        depth: create_model(
            "dit_xl_2",
            depth=depth,
            hidden_size=args.width,
            num_heads=16,
            input_size=args.input_size,
        ).to(device)
        for depth in args.depths
    }
    z = torch.randn(args.batch_size, 4, args.input_size, args.input_size, device=device)
    y = torch.zeros(args.batch_size, dtype=torch.long, device=device)
    seconds: dict[int, list[float]] = {depth: [] for depth in models}
    for turn in range(args.rounds + 1):
        for depth, model in models.items():
            start = time.perf_counter()
            objective.sample(
                model.eval(),
                z,
                y,
                sampler="ddim",
                num_sampling_steps=args.steps,
                guidance_scale=1.5,
            ).cpu()
            if turn:  # the first warms up
                seconds[depth].append(time.perf_counter() - start)
    return {depth: statistics.median(each) for depth, each in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("width", 1152),
        ("input-size", 32),
        ("batch-size", 1),
        ("steps", 1),
        ("rounds", 3),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--depths", type=int, nargs="+", default=[28, 19, 14, 7])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--figure", type=Path, help="where the figure goes")
    args = parser.parse_args()
    seconds, deepest = measure(args), max(args.depths)
    points = []
    for depth, taken in sorted(seconds.items(), reverse=True):
        ideal, faster = deepest / depth, seconds[deepest] / taken
        points.append((f"D{depth}", ideal, faster))
        print(
            f"D{depth}: {faster:.2f}x of an ideal {ideal:.2f}x ({faster / ideal:.3f} of it)",
            flush=True,
        )
    if args.figure:
        write_speedup(args.figure, points)


if __name__ == "__main__":
    main()
