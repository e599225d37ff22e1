"""Compare a training step that gathers samples with the plain formula m*block(x) + (1-m)*x on the
same blocks.

Both run in this process on the same model, batch and noise, alternately, so that their ratio does
not depend on the machine's load. Prints, for full updates and for LoRA beside frozen weights: the
time of a step (forward and backward, median), the bytes that autograd saves for the backward (the
activations), and the peak memory of a step beyond what the process held before (on a CPU by the
resident set, in a process of its own for each of the two; on a GPU by the allocator).

    python benchmarks/gated_blocks.py [--model dit_digits] [--batch-size 128] [--pattern 1:2]
        [--rounds 15] [--device cpu]

``--against SRC`` compares the gathered step with that of another checkout instead (its ``src``
folder): both run in a process of their own and take turns, step by step."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from tinyfusion_pl import create_model
from tinyfusion_pl.objectives import GaussianDiffusion
from tinyfusion_pl.pruning import DepthGates, WeightUpdate


class SavedBytes:
    """Bytes that autograd keeps for the backward, each storage counted once, parameters not at
    all.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def __enter__(self) -> SavedBytes:
        self.storages: dict[int, int] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.parameters:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    def __exit__(self, *exc) -> None:
        self.hooks.__exit__(*exc)

    @property
    def total(self) -> int:
        return sum(self.storages.values())


class Case:
    """A gated model, a batch, and one training step on it."""

    def __init__(self, args: argparse.Namespace, weight_update: str) -> None:
        torch.manual_seed(0)
        self.device = torch.device(args.device)
        self.model = create_model(args.model).to(self.device)
        with (
            torch.no_grad()
        ):  # adaLN-Zero starts every block as the identity; a trained model does not
            for block in self.model.blocks:
                block.adaLN_modulation[1].weight.normal_(std=0.02)
        WeightUpdate(weight_update).start(self.model)
        self.model.train()
        self.gates = DepthGates(self.model, args.pattern, tau=1.0).to(self.device)
        self.objective, c = GaussianDiffusion(), self.model.config
        self.y = torch.randint(c["num_classes"], (args.batch_size,), device=self.device)
        shape = (args.batch_size, c["in_channels"], c["input_size"], c["input_size"])
        self.draw = self.objective.draw(torch.randn(shape, device=self.device))
        self.parameters = [
            p for p in (*self.model.parameters(), *self.gates.parameters()) if p.requires_grad
        ]

    def loss(self, gather: bool) -> torch.Tensor:
        self.gates.gather = gather
        return self.objective.losses(self.model(self.draw.x_t, self.draw.t, self.y), self.draw)[
            "loss"
        ].mean()

    def step(self, gather: bool) -> float:
        """Seconds of a forward and a backward."""
        for p in self.parameters:
            p.grad = None
        self.synchronize()
        start = time.perf_counter()
        self.loss(gather).backward()
        self.synchronize()
        return time.perf_counter() - start

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def saved_bytes(self, gather: bool) -> int:
        with SavedBytes(self.model) as counter:
            loss = self.loss(gather)
        del loss
        return counter.total

    def peak_bytes(self, gather: bool) -> int:
        """Memory of three steps beyond what was held before."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.step(gather)
            return torch.cuda.max_memory_allocated() - before
        Path("/proc/self/clear_refs").write_text(
            "5"
        )  # forget the largest resident set so far (Linux)
        before = resident("VmRSS")
        for _ in range(3):
            self.step(gather)
        return resident("VmHWM") - before


def resident(field: str) -> int:
    """Bytes of this process's resident set now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def peak_in_child(args: argparse.Namespace, weight_update: str, gather: bool) -> int:
    command = [
        sys.executable,
        __file__,
        *sys.argv[1:],
        "--peak",
        weight_update,
        "gathered" if gather else "plain",
    ]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(args: argparse.Namespace, weight_update: str) -> None:
    case = Case(args, weight_update)
    for gather in (True, False):
        case.step(gather)
    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(args.rounds):
        for gather in (True, False):
            times[gather].append(case.step(gather))
    gathered, plain = (statistics.median(times[g]) for g in (True, False))
    saved = {g: case.saved_bytes(g) / 2**20 for g in (True, False)}
    peak = {
        g: (case.peak_bytes(g) if args.device == "cuda" else peak_in_child(args, weight_update, g))
        / 2**20
        for g in (True, False)
    }
    print(
        f"{args.model} batch {args.batch_size} pattern {args.pattern} {weight_update:6s} on "
        f"{args.device}, plain -> gathered: "
        f"step {plain * 1e3:.0f} -> {gathered * 1e3:.0f} ms ({plain / gathered:.2f}x faster); "
        f"saved activations {saved[False]:.0f} -> {saved[True]:.0f} MiB "
        f"({saved[True] / saved[False]:.2f}x); "
        f"peak memory {peak[False]:.0f} -> {peak[True]:.0f} MiB ({peak[True] / peak[False]:.2f}x)",
        flush=True,
    )


def serve(args: argparse.Namespace, weight_update: str) -> None:
    """One gathered step for each line read; prints its seconds."""
    case = Case(args, weight_update)
    for _ in sys.stdin:
        print(case.step(True), flush=True)


def compare(args: argparse.Namespace, weight_update: str) -> None:
    own = str(Path(__file__).resolve().parents[1] / "src")
    times: dict[str, list[float]] = {own: [], str(Path(args.against).resolve()): []}
    options = [
        each for each in sys.argv[1:] if not each.startswith("--against") and each != args.against
    ]
    processes = {
        source: subprocess.Popen(
            [sys.executable, __file__, *options, "--serve", weight_update],
            env={**os.environ, "PYTHONPATH": source},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for source in times
    }
    for _ in range(args.rounds + 2):  # the first two warm up
        for source, process in processes.items():
            process.stdin.write("step\n")
            process.stdin.flush()
            times[source].append(float(process.stdout.readline()))
    for process in processes.values():
        process.communicate()
    ours, theirs = (statistics.median(each[2:]) for each in times.values())
    print(
        f"{args.model} batch {args.batch_size} pattern {args.pattern} {weight_update:6s} on "
        f"{args.device}, gathered: "
        f"step {theirs * 1e3:.0f} -> {ours * 1e3:.0f} ms (ratio {ours / theirs:.2f})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="dit_digits")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--pattern", default="1:2")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--peak",
        nargs=2,
        metavar=("UPDATE", "KIND"),
        help="print the peak memory of one kind in bytes, then exit",
    )
    parser.add_argument(
        "--against", metavar="SRC", help="compare with another checkout's src folder"
    )
    parser.add_argument("--serve", metavar="UPDATE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args, args.serve)
    if args.peak:
        print(Case(args, args.peak[0]).peak_bytes(args.peak[1] == "gathered"))
        return
    for weight_update in ("full", "lora"):
        (compare if args.against else measure)(args, weight_update)


if __name__ == "__main__":
    main()
