"""FLOPs, memory and time of a training step, predicted from a model's sizes, on 1 or more H100s.

FLOPs and bytes of parameters are exact, activations counted operation by operation (see
`model_sizes`; tests/benchmarks/test_cost_model.py holds them against the counter of torch and
against real tensors); times assume a share of the peak (`Machine`).

    python benchmarks/cost_tables.py              # the tables of docs/scaling.md
    python benchmarks/cost_tables.py --check      # against measured small models on this machine
"""

from __future__ import annotations

from dataclasses import dataclass

from model_sizes import Model


@dataclass(frozen=True)
class Machine:
    """An H100 SXM, and what of it a step is assumed to reach.

    Attributes:
        flops: Peak of dense bf16, a second. precise: Peak of float32 products as tf32. share: Of
        the peak that matrix products reach: an assumption, not a measurement. bandwidth: Bytes of
        memory a second. inside, across: Bytes a second that a device sends to others of its node of
        8, and of other nodes. host: Bytes a second to the CPU's memory. memory: Bytes.
    """

    flops: float = 989e12
    precise: float = 495e12
    share: float = 0.4
    bandwidth: float = 3.35e12
    inside: float = 450e9
    across: float = 50e9
    host: float = 55e9
    memory: float = 80e9


@dataclass(frozen=True)
class Step:
    """One step on one device.

    Attributes:
        stage: ``"search"`` (gates on the dense model) or ``"recovery"`` (a shallow student and the
        dense teacher). batch: Samples on a device. kept: Share of the blocks that stay. update:
        ``"full"``, ``"lora"`` or ``"frozen"``: of the search's weights, and of the student's.
        gather: Whether dropped samples skip the block's backward pass. mixed: bf16 autocast beside
        float32 weights. checkpointing: Share of blocks whose activations are computed again.
        optimizer_bytes: Of AdamW's averages, a trained parameter: 8, or 2 of 8-bit AdamW. ema:
        Whether averaged weights are kept. teacher_bytes: Of a teacher's parameter: 4, 2 in bf16, 0
        on the CPU. lora_rank: Rank of the adapters, which are on every linear layer. sharded:
        Whether parameters, gradients and optimizer are divided over the devices (FSDP2).
    """

    stage: str
    batch: int
    kept: float = 0.5
    update: str = "full"
    gather: bool = True
    mixed: bool = True
    checkpointing: float = 0.0
    optimizer_bytes: float = 8.0
    ema: bool = True
    teacher_bytes: float = 4.0
    lora_rank: int = 8
    sharded: bool = False


def trained_params(model: Model, step: Step) -> float:
    """Parameters that the optimizer steps."""
    if step.update == "frozen":
        return 0.0
    if step.update == "lora":
        return sum(s.num * s.lora_params(step.lora_rank) for s in model.stacks)
    return student_params(model, step)


def student_params(model: Model, step: Step) -> float:
    """Parameters of what trains: the dense model under gates, or the shallow student."""
    blocks = model.params() - model.rest_params
    return model.rest_params + blocks * (step.kept if step.stage == "recovery" else 1.0)


def step_flops(model: Model, step: Step) -> float:
    """FLOPs of a step on one device: a backward pass is two forward passes, one where weights are
    frozen.

    In the search, `kept` of the rows of each block have a backward pass where samples are gathered;
    all of them run forward."""
    f, rest = model.block_flops(), 3 * model.rest_flops
    backward = 2.0 if step.update == "full" else 1.0
    again = step.checkpointing
    if step.stage == "recovery":
        student = step.kept * f * (1 + backward + again)
        return step.batch * (student + rest + model.flops())  # the teacher runs forward
    share = step.kept if step.gather else 1.0
    lora = (
        sum(s.num * s.lora_flops(step.lora_rank) for s in model.stacks)
        if step.update == "lora"
        else 0.0
    )
    if step.update != "full":
        rest = 2 * model.rest_flops
    return step.batch * (f * (1 + share * (backward + again)) + lora * (1 + 2 * share) + rest)


def step_bytes(model: Model, step: Step, *, devices: int = 1) -> dict[str, float]:
    """Bytes that a step holds on one device, by what they are."""
    trained, all_params = trained_params(model, step), student_params(model, step)
    divided = devices if step.sharded else 1
    share = step.kept if step.stage == "recovery" or step.gather else 1.0
    live = (
        step.batch
        * share
        * (
            (1 - step.checkpointing) * model.activations(mixed=step.mixed)
            + step.checkpointing * model.boundaries(mixed=step.mixed)
        )
    )
    if step.stage == "search":  # what each block added, for the gradient of its mask
        live += step.batch * sum(s.num * 4 * s.num_tokens * s.width for s in model.stacks)
    if step.mixed:  # weights as autocast casts them
        live += 2 * all_params * (1 - step.checkpointing)
    if step.checkpointing:  # and one block at work
        live += step.batch * max(s.activations(mixed=step.mixed) for s in model.stacks)
    return {
        "weights": 4 * all_params / divided,
        "gradients": 4 * trained / divided,
        "optimizer": step.optimizer_bytes * trained / divided,
        "averaged": 4 * trained / divided if step.ema else 0.0,
        "teacher": (step.teacher_bytes * model.params() / divided)
        if step.stage == "recovery"
        else 0.0,
        "activations": live,
    }


def step_seconds(
    model: Model, step: Step, *, devices: int = 1, machine: Machine | None = None
) -> dict[str, float]:
    """Seconds of a step, by where they go; communication is counted as if nothing of it overlapped
    with computing.
    """
    machine = machine or Machine()
    peak = machine.share * (machine.flops if step.mixed else machine.precise)
    trained, params = trained_params(model, step), student_params(model, step)
    link = machine.inside if devices <= 8 else machine.across
    sent = (
        4 * trained * 2
        if not step.sharded
        else 2 * (3 * params + (model.params() if step.stage == "recovery" else 0))
    )
    stepped = trained / (devices if step.sharded else 1)
    # Weights and averages are read and written, gradients read, averaged weights read and written
    # beside the weights.
    moved = stepped * (4 * 3 + 2 * step.optimizer_bytes + (12 if step.ema else 0))
    offload = (
        4 * model.params() / machine.host
        if step.stage == "recovery" and not step.teacher_bytes
        else 0.0
    )
    return {
        "compute": step_flops(model, step) / peak,
        "optimizer and EMA": moved / machine.bandwidth,
        "communication": sent * (devices - 1) / devices / link,
        "teacher to the device": offload,
    }
