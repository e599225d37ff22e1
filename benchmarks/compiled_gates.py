"""Measure the cost of `torch.compile` on a gated model: eager, compiled, and compiled with gates.

Masks change with every batch, so gates are never traced: while they are installed, each block is
compiled separately, and one graph serves all blocks of a class. Prints the seconds of the first
training step (which compiles) and of the next two, and the number of compiled graphs.

    python benchmarks/compiled_gates.py [--model dit_digits] [--depth 4] [--batch-size 16]
        [--device cpu]
"""

from __future__ import annotations

import argparse
import time

import torch
from torch._dynamo.utils import counters

from tinyfusion_pl import create_model
from tinyfusion_pl.pruning.pruner import DepthPruner


class Holder(torch.nn.Module):
    """What a LightningModule is to its model."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model


def measure(args: argparse.Namespace, *, compiled: bool, gated: bool) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()
    model = create_model(args.model, depth=args.depth).to(args.device)
    c = model.config
    x = torch.randn(
        args.batch_size, c["in_channels"], c["input_size"], c["input_size"], device=args.device
    )
    t = torch.rand(args.batch_size, device=args.device) * 999
    y = torch.randint(c["num_classes"], (args.batch_size,), device=args.device)
    holder = Holder(torch.compile(model) if compiled else model).train()
    gates = DepthPruner("1:2", weight_update="full").start(holder) if gated else None
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        if gates is not None:
            gates.redraw()
        holder.model(x, t, y).square().mean().backward()
        seconds.append(time.perf_counter() - start)
    kind = f"{'compiled' if compiled else 'eager'}{' with gates' if gated else ''}"
    print(
        f"{args.model} depth {args.depth} batch {args.batch_size} on {args.device}, {kind:19s}: "
        f"first steps "
        f"{', '.join(f'{s:.2f}' for s in seconds)} s; {counters['stats']['unique_graphs']} graphs",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="dit_digits")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    args = parser.parse_args()
    for compiled, gated in ((False, False), (False, True), (True, False), (True, True)):
        measure(args, compiled=compiled, gated=gated)


if __name__ == "__main__":
    main()
