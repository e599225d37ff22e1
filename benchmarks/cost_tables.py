"""Print the tables of docs/scaling.md, or compare the cost model with measured small models.

python benchmarks/cost_tables.py
python benchmarks/cost_tables.py --check
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from cost_model import Machine, Step, step_bytes, step_flops, step_seconds
from model_sizes import MODELS

GIB = 2**30
BATCHES = {"DiT-XL/2": 32, "SD3.5-L": 2, "FLUX.1-dev": 1}  # samples a device


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def table(*header: str) -> list[str]:
    return [row(*header), "|" + "---|" * len(header)]


def usual(name: str, stage: str) -> Step:
    """A search by LoRA or a full recovery, activations of the large models checkpointed."""
    update = "lora" if stage == "search" else "full"
    return Step(stage, BATCHES[name], update=update, checkpointing=float(name != "DiT-XL/2"))


def costs() -> list[str]:
    parts = "weights, gradients, optimizer, averages, teacher, activations"
    lines = table("model", "parameters", "forward", "stage", "FLOPs a step", f"GiB ({parts})")
    for name, model in MODELS.items():
        for stage in ("search", "recovery"):
            step = usual(name, stage)
            held = [f"{value / GIB:.1f}" for value in step_bytes(model, step).values()]
            total = sum(step_bytes(model, step).values()) / GIB
            size, forward = f"{model.params() / 1e9:.2f} B", f"{model.flops() / 1e12:.2f} T"
            flops = f"{step_flops(model, step) / 1e12:.0f} T, {step.batch} samples"
            lines.append(row(name, size, forward, stage, flops, f"{total:.1f} ({', '.join(held)})"))
    return lines


def times() -> list[str]:
    lines = table(
        "model, stage",
        "devices",
        "step",
        "samples/s",
        "compute",
        "optimizer, EMA",
        "communication",
        "GiB a device",
    )
    for name, model in MODELS.items():
        for stage in ("search", "recovery"):
            for devices in (1, 8, 64):
                sharded = devices > 1 and name != "DiT-XL/2" and stage == "recovery"
                step = replace(usual(name, stage), teacher_bytes=2.0, sharded=sharded)
                seconds = step_seconds(model, step, devices=devices)
                total = sum(seconds.values())
                shares = [
                    f"{seconds[k] / total:.0%}"
                    for k in ("compute", "optimizer and EMA", "communication")
                ]
                held = sum(step_bytes(model, step, devices=devices).values())
                fits = "" if held <= Machine().memory else ", does not fit"
                rate = f"{devices * step.batch / total:,.0f}"
                lines.append(
                    row(
                        f"{name}, {stage}",
                        str(devices),
                        f"{total * 1e3:.0f} ms",
                        rate,
                        *shares,
                        f"{held / GIB:.0f}{fits}",
                    )
                )
    return lines


def savings() -> list[str]:
    lines = table(
        "what is changed", *(f"{name}: {kind}" for name in MODELS for kind in ("GiB", "compute"))
    )
    for what, stage, before, after in SAVINGS:
        cells = []
        for name, model in MODELS.items():
            base = replace(usual(name, stage), update="full")
            one, other = replace(base, **before), replace(base, **after)
            memory = sum(step_bytes(model, other).values()) - sum(step_bytes(model, one).values())
            ratio = step_seconds(model, other)["compute"] / step_seconds(model, one)["compute"]
            cells += [f"{memory / GIB:+.1f}", f"{ratio:.2f}x"]
        lines.append(row(what, *cells))
    return lines


def tables() -> str:
    """The Markdown tables of docs/scaling.md."""
    return "\n".join([*costs(), "", *times(), "", *savings()])


SAVINGS = [  # what, stage, without it, with it
    ("gathering (search, full updates)", "search", {"gather": False}, {}),
    ("LoRA instead of full updates (search)", "search", {}, {"update": "lora"}),
    ("bf16 instead of float32 (recovery)", "recovery", {"mixed": False}, {}),
    (
        "activation checkpointing (recovery)",
        "recovery",
        {"checkpointing": 0.0},
        {"checkpointing": 1.0},
    ),
    ("8-bit AdamW (recovery)", "recovery", {}, {"optimizer_bytes": 2.0}),
    ("teacher in bf16 (recovery)", "recovery", {}, {"teacher_bytes": 2.0}),
    ("teacher on the CPU between batches (recovery)", "recovery", {}, {"teacher_bytes": 0.0}),
]


def check() -> None:
    """FLOPs and activations of real steps of a small DiT against the prediction."""
    from measured_costs import cases

    for name, predicted, measured in cases():
        print(
            f"{name}: predicted {predicted:,.0f}, measured {measured:,.0f} "
            f"({predicted / measured - 1:+.1%})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="compare the prediction with small models"
    )
    if parser.parse_args().check:
        return check()
    print(tables())


if __name__ == "__main__":
    main()
