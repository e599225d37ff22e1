"""Compare steps of search and recovery with a plain PyTorch loop of the published recipe.

The plain loop was written for this comparison: every block runs on all samples and is blended by
float32 masks; AdamW steps one tensor after the other, and so do averaged weights; the teacher is in
float32, its hidden states are collected in every step. Ours are samples gathered by mask, fused
AdamW where the device has it, averages in one kernel, a teacher in the precision of the fit, hidden
states only while they count. Both take turns in this process, so that the ratio does not depend on
the machine's load; with --rounds 0 only memory is measured. Peak memory is that of a process of its
own (of the allocator on a GPU), beyond what the models hold.

    python benchmarks/training.py
        [--width 768 --heads 12 --depth 4 --batch-size 4 --input-size 32]
        [--rounds 5] [--device cpu] [--compile]
    python benchmarks/training.py --width 1152 --heads 16 --depth 28 --batch-size 64
        --device cuda --mixed    # DiT-XL/2
"""

from __future__ import annotations

import argparse
import copy
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from gated_blocks import resident
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from tinyfusion_pl import create_model
from tinyfusion_pl.distill import Distillation
from tinyfusion_pl.distill.teacher import lowered
from tinyfusion_pl.models.layers import unpatchify
from tinyfusion_pl.modules.optimizers import use_fused
from tinyfusion_pl.objectives import GaussianDiffusion
from tinyfusion_pl.pruning import DepthGates, WeightUpdate, remove_blocks
from tinyfusion_pl.pruning.compiled import compile_blocks

CASES = ("search full", "search lora", "recovery", "recovery without hidden states")
DECAY = 0.9999


class Side:
    """A model that trains, on the way to be measured."""

    def __init__(self, args: argparse.Namespace, case: str, *, ours: bool) -> None:
        torch.manual_seed(0)
        self.args, self.ours, self.device = args, ours, torch.device(args.device)
        self.objective = GaussianDiffusion()
        dense = create_model(
            "dit_xl_2",
            hidden_size=args.width,
            num_heads=args.heads,
            depth=args.depth,
            input_size=args.input_size,
        ).to(self.device)
        for block in (
            dense.blocks
        ):  # adaLN-Zero starts every block as the identity; a trained model does not
            nn.init.normal_(block.adaLN_modulation[1].weight, std=0.02)
        self.y = torch.randint(1000, (args.batch_size,), device=self.device)
        self.draw = self.objective.draw(
            torch.randn(args.batch_size, 4, args.input_size, args.input_size, device=self.device)
        )
        self.begin(dense, case)
        self.model.train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trained, lr=1e-4, weight_decay=0.0, foreach=None if ours else False
        )
        if ours:
            use_fused(self.optimizer)
        self.averaged, self.trained = [p.detach().clone() for p in trained], trained
        self.average = get_ema_multi_avg_fn(DECAY)

    def begin(self, dense: nn.Module, case: str) -> None:
        raise NotImplementedError

    def loss(self) -> torch.Tensor:
        raise NotImplementedError

    def step(self) -> float:
        """Seconds of a step."""
        self.synchronize()
        start = time.perf_counter()
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16) if self.args.mixed else nullcontext():
            loss = self.loss()
        loss.backward()
        self.optimizer.step()
        if self.ours:
            self.average(self.averaged, [p.detach() for p in self.trained], 1)
        else:
            with torch.no_grad():
                for average, parameter in zip(self.averaged, self.trained):
                    average.mul_(DECAY).add_(parameter, alpha=1 - DECAY)
        self.synchronize()
        return time.perf_counter() - start

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak(self) -> int:
        """Bytes of two steps beyond what the models and the optimizer hold."""
        self.step()
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.step()
            return torch.cuda.max_memory_allocated() - before
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        self.step()
        return resident("VmHWM") - before


class Search(Side):
    def begin(self, dense: nn.Module, case: str) -> None:
        self.model = dense
        WeightUpdate(case.split()[1]).start(dense)
        if self.ours:
            if self.args.compile:
                compile_blocks(dense.blocks)
            self.gates = DepthGates(dense, "1:2", tau=1.0).to(self.device)
        else:
            self.logits = nn.Parameter(torch.zeros(self.args.depth // 2, 2, device=self.device))

    def loss(self) -> torch.Tensor:
        draw = self.draw
        if self.ours:
            self.gates.redraw()
            output = self.model(draw.x_t, draw.t, self.y)
        else:
            output = self.plain()
        return self.objective.losses(output, draw)["loss"].mean()

    def plain(self) -> torch.Tensor:
        """Masks by Gumbel-softmax, straight through; every block on every sample."""
        model, draw = self.model, self.draw
        shape = (self.args.batch_size, *self.logits.shape)
        soft = nn.functional.gumbel_softmax(
            self.logits.expand(shape), tau=1.0, dim=-1
        )  # (N, groups, 2)
        hard = nn.functional.one_hot(soft.argmax(-1), 2).float()
        masks = (hard - soft.detach() + soft).flatten(1)  # (N, blocks)
        x = model.x_embedder(draw.x_t) + model.pos_embed
        c = model.t_embedder(draw.t) + model.y_embedder(self.y)
        for index, block in enumerate(model.blocks):
            m = masks[:, index, None, None]
            x = m * block(x, c) + (1 - m) * x
        return unpatchify(model.final_layer(x, c), model.patch_size)


class Recover(Side):
    def begin(self, dense: nn.Module, case: str) -> None:
        depth = self.args.depth
        self.model = remove_blocks(copy.deepcopy(dense), {"blocks": list(range(0, depth, 2))})
        self.teacher = dense.eval().requires_grad_(False)
        self.counts = case == "recovery"  # whether the weight of hidden states is still above 0
        self.pairs = {"blocks": [(i, 2 * i + 1) for i in range(depth // 2)]}
        self.distill = Distillation(pairs=self.pairs)
        if self.ours:
            if self.args.mixed:
                self.teacher = lowered(self.teacher, torch.bfloat16)
            if self.args.compile:
                compile_blocks([*self.model.blocks, *self.teacher.blocks])

    def loss(self) -> torch.Tensor:
        # The published code collects and compares hidden states to the end, where their weight is
        # 0.
        pairs = self.pairs if self.counts or not self.ours else {}
        losses = self.distill.losses(
            self.model,
            self.teacher,
            self.objective,
            self.draw,
            self.y,
            pairs=pairs,
            feature_weight=1e-2 if pairs else 0.0,
        )
        return losses["loss"].mean()


def side(args: argparse.Namespace, case: str, *, ours: bool) -> Side:
    return (Search if case.startswith("search") else Recover)(args, case, ours=ours)


def peak_in_child(case: str, kind: str) -> int:
    command = [sys.executable, __file__, *sys.argv[1:], "--peak", case, kind]
    return int(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
    )


def measure(args: argparse.Namespace, case: str) -> None:
    said = []
    if args.rounds:
        sides = {ours: side(args, case, ours=ours) for ours in (False, True)}
        times: dict[bool, list[float]] = {False: [], True: []}
        for each in sides.values():
            each.step()
        for _ in range(args.rounds):
            for ours, each in sides.items():
                times[ours].append(each.step())
        plain, ours = (statistics.median(times[kind]) for kind in (False, True))
        said.append(f"step {plain:.2f} -> {ours:.2f} s ({plain / ours:.2f}x faster)")
        del sides
    if args.memory:
        peaks = [peak_in_child(case, kind) / 2**20 for kind in ("plain", "ours")]
        said.append(
            f"peak memory {peaks[0]:.0f} -> {peaks[1]:.0f} MiB ({peaks[1] / peaks[0]:.2f}x)"
        )
    print(
        f"width {args.width} depth {args.depth} batch {args.batch_size} on {args.device}, "
        f"{case}: {'; '.join(said)}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("width", 768),
        ("heads", 12),
        ("depth", 4),
        ("batch-size", 4),
        ("input-size", 32),
        ("rounds", 5),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--mixed", action="store_true", help="bf16 autocast")
    parser.add_argument("--compile", action="store_true", help="our side with compiled blocks")
    parser.add_argument(
        "--memory",
        action="store_true",
        help="also the peak memory, each side in a process of its own",
    )
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES)
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "KIND"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print(side(args, args.peak[0], ours=args.peak[1] == "ours").peak())
        return
    for case in args.cases:
        measure(args, case)


if __name__ == "__main__":
    main()
