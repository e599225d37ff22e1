"""Compare shared forward passes of many structures with one pass per structure.

Counts block runs (one block on one sample), which do not depend on the machine, and times both on
the same model in this process.

    python benchmarks/structures.py [--model dit_digits] [--pattern 1:2 | --keep 6]
        [--num-structures 0] [--max-rows 4096] [--samples 8]
"""

from __future__ import annotations

import argparse
import time

import torch

from tinyfusion_pl.models import create_model
from tinyfusion_pl.selection import Calibration, Space
from tinyfusion_pl.selection.candidates import all_structures, distinct, sample_structures
from tinyfusion_pl.selection.structures import open_structures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="dit_digits")
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--pattern", default=None)
    parser.add_argument("--keep", type=int, default=None)
    parser.add_argument("--num-structures", type=int, default=0, help="drawn at random; 0: all")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--max-rows", type=int, default=4096)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = create_model(args.model, depth=args.depth).eval()
    with torch.no_grad():  # an untrained DiT's blocks are the identity
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    c = model.config
    calibration = Calibration(
        (
            torch.randn(args.samples, c["in_channels"], c["input_size"], c["input_size"]),
            torch.rand(args.samples) * 999,
            torch.randint(c["num_classes"], (args.samples,)),
        ),
        num_samples=args.samples,
    )
    space = Space(model, keep=args.keep, pattern=args.pattern or (None if args.keep else "1:2"))
    structures = (
        distinct(sample_structures(space, torch.zeros(space.num_units), args.num_structures))
        if args.num_structures
        else all_structures(space)
    )
    results = {}
    with open_structures(model, space, max_rows=args.max_rows) as runner:
        runner.ask(calibration)
        for name, rows in (("shared", args.max_rows), ("one by one", args.samples)):
            runner.max_rows, before, start = rows, runner.num_block_runs, time.perf_counter()
            losses = runner.means(calibration, structures)
            results[name] = (
                losses,
                (runner.num_block_runs - before) // args.samples,
                time.perf_counter() - start,
            )
    (shared, runs, seconds), (single, runs_single, seconds_single) = results.values()
    print(
        f"{len(structures)} structures of {args.model} depth {args.depth}: block runs "
        f"{runs_single} -> {runs} ({runs_single / runs:.2f}x "
        f"fewer); {seconds_single:.1f} -> {seconds:.1f} s ({seconds_single / seconds:.2f}x "
        f"faster); relative difference of losses "
        f"{((shared - single).abs() / single).max():.1e}"
    )


if __name__ == "__main__":
    main()
