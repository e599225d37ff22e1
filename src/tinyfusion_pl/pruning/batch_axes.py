"""Which axis of each of a block's tensors is the batch: found out by running the block, not guessed.

A size can agree with the batch by chance (16 tokens in a batch of 16; as many heads as samples; a
rotary table whose length the batch divides), and sequence-first layers have the batch second. So a
block is run on part of a batch at its first call, quietly, and the result is held against the same
part of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion_pl.pruning.calls import Call, quiet
from tinyfusion_pl.pruning.streams import Key, Streams, find_streams

SAMPLES_MIX = "its samples are not independent of one another"
Run = Callable[[Mapping[str, Tensor]], Mapping[Key, Tensor]]


@dataclass(frozen=True)
class BatchPlan:
    """How the batch of a block's calls can be divided.

    Attributes:
        streams: What the block carries.
        axis: Batch axis of the streams.
        per_sample: Batch axis of each further tensor that has one.
        plain_because: Why the batch must not be divided; empty where it may.
        writes_streams: Whether the block writes into the hidden states that it is given.
    """

    streams: Streams
    axis: int
    per_sample: Mapping[str, int]
    plain_because: str = ""
    writes_streams: bool = False

    def select(self, call: Call, index: Tensor) -> dict[str, Tensor]:
        """The tensors of the samples at `index`."""
        return {
            name: call.tensors[name].index_select(axis, index) for name, axis in self.axes.items()
        }

    @property
    def axes(self) -> dict[str, int]:
        """Batch axis of every tensor that has one, by name."""
        return {**dict.fromkeys(self.streams.names, self.axis), **self.per_sample}


def shape_key(call: Call) -> tuple:
    """What a plan depends on: which tensors there are, and which sizes agree with one another."""
    sizes: dict[int, int] = {1: -1}
    return tuple(
        (name, *(sizes.setdefault(size, len(sizes)) for size in tensor.shape))
        for name, tensor in call.tensors.items()
    )


def couples_samples(block: nn.Module) -> bool:
    """Whether the block has batch statistics, so that part of a batch gives other numbers."""
    return any(
        isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in block.modules()
    )


def plan_batch(
    block: nn.Module, forward: Callable, call: Call, *, given: list[str] | None, name: str
) -> BatchPlan:
    """Find the streams and batch axes of `block` from one of its calls, by running it a few times.

    Args:
        block: The block, for its class and modules.
        forward: Its own forward.
        call: The call.
        given: See `find_streams`.
        name: What messages call the block.

    Raises:
        ValueError: when the streams cannot be told, or neither axis 0 nor 1 can be the batch.
    """
    couples = couples_samples(block)
    with quiet(block):
        if call.remembering:  # never twice with the same memory
            streams = _streams_of_remembering(block, forward, call, given, name)
            return BatchPlan(streams, _stated_axis(block), {}, _may_change(call.remembering[0]))
        written: list[str] = []
        whole = _run(forward, call, {}, written)
        streams = find_streams(block, call, whole, given=given, name=name)

        def run(tensors: Mapping[str, Tensor]) -> Mapping[Key, Tensor]:
            return streams.take(_run(forward, call, tensors))

        reference = streams.take(whole)
        axis, reason = _stream_axis(block, call, streams, run, reference, name)
        num_samples = call.tensors[streams.names[0]].shape[axis]
        writes_streams = bool(set(written) & set(streams.names))
        if others := [each for each in written if each not in streams.names]:
            reason = _may_change(others[0])
        elif couples:
            reason = "batch normalization couples its samples"
        elif streams.extras:
            reason = "it returns more than its hidden states"
        per_sample: Mapping[str, int] | None = {}
        if not reason and num_samples > 1:
            per_sample = _per_sample(call, streams, axis, num_samples, run, reference)
            if per_sample is None:
                reason = "part of a batch does not give the same part of the result"
        return BatchPlan(streams, axis, per_sample or {}, reason, writes_streams)


def _may_change(argument: str) -> str:
    return f"it may change its argument '{argument}'"


def _streams_of_remembering(
    block: nn.Module, forward: Callable, call: Call, given, name: str
) -> Streams:
    """From a call without what the block would change."""
    kept = {
        k: v
        for k, v in call.kwargs.items()
        if not any(r == k or r.startswith(f"{k}[") for r in call.remembering)
    }
    args = [None if any(r == n or r.startswith(f"{n}[") for r in call.remembering) else v
            for n, v in zip(call.positional, call.args)]  # fmt: skip
    try:
        output = forward(*args, **kept)
    except Exception as error:
        raise ValueError(
            f"{name} may change its argument {call.remembering[0]!r}, and cannot run without it ({error}), so that its hidden "
            "states cannot be found. Train without a cache (use_cache=False)."
        ) from error
    return find_streams(block, call, output, given=given, name=name)


def _run(
    forward: Callable, call: Call, tensors: Mapping[str, Tensor], written: list[str] | None = None
) -> Any:
    """What `forward` returns for the call with `tensors` in it; adds the names of what it wrote into to `written`."""
    copies = {
        n: tensors.get(n, t).clone()
        for n, t in call.tensors.items()
        if not isinstance(t, nn.Parameter)
    }
    args, kwargs = call.replace(copies)
    before = Call(None, args, kwargs)
    output = forward(*args, **kwargs)
    if written is not None:
        written += [n for n, copy in copies.items() if copy._version != 0]
        after = Call(None, args, kwargs)
        if list(map(id, before.leaves)) != list(map(id, after.leaves)):
            written += [n for n in call.parameters if isinstance(call.value(n), (list, dict))][:1]
    return output


def _stated_axis(block: nn.Module) -> int:
    stated = [
        m.batch_first for m in block.modules() if isinstance(getattr(m, "batch_first", None), bool)
    ]
    return 1 if stated and not any(stated) else 0


def _stream_axis(
    block, call: Call, streams: Streams, run: Run, reference, name: str
) -> tuple[int, str]:
    """The axis along which samples are independent; the second item says why none is."""
    tensors = [call.tensors[n] for n in streams.names]
    first = _stated_axis(block)
    for axis in (first, 1 - first):
        sizes = {t.shape[axis] if t.ndim > axis else -1 for t in tensors}
        if (
            len(sizes) == 1
            and -1 not in sizes
            and (
                sizes == {1}
                or _only_touches(0, axis, streams.names, axis, call, run, reference) is not False
            )
        ):
            return axis, ""
    sizes = {t.shape[first] if t.ndim > first else -1 for t in tensors}
    if len(sizes) > 1:
        raise ValueError(
            f"{name}: its hidden states {call.describe()} have no batch axis in common; axis 0 (or 1, with batch_first=False) must be "
            "the batch."
        )
    return first, SAMPLES_MIX


def _only_touches(
    index: int, axis: int, names: Iterable[str], stream_axis: int, call: Call, run: Run, reference
) -> bool | None:
    """Whether changing entry `index` of these tensors changes that sample alone; None: it changes nothing."""
    changed = {}
    for n in names:
        tensor = call.tensors[n].clone()
        if tensor.dtype == torch.bool:
            tensor.select(axis, index).logical_not_()
        elif tensor.is_floating_point():
            entry = tensor.select(axis, index)
            finite = torch.where(torch.isfinite(entry), entry, torch.zeros_like(entry))
            entry.copy_(finite + torch.randn_like(entry) * (finite.std(unbiased=False) + 0.1))
        else:
            return None
        changed[n] = tensor
    touched = False
    for key, out in run(changed).items():
        difference = (out.float() - reference[key].float()).abs().movedim(stream_axis, 0)
        difference = difference.reshape(len(difference), -1).amax(1)
        moved = difference > _tolerance(reference[key])
        if moved[torch.arange(len(moved), device=moved.device) != index].any():
            return False
        touched |= bool(moved[index])
    return touched or None


def _per_sample(
    call: Call, streams: Streams, axis: int, num_samples: int, run: Run, reference
) -> dict[str, int] | None:
    """The batch axes of the further tensors, held against a run of part of the batch; None where none fit."""
    extras = {n: t for n, t in call.tensors.items() if n not in streams.names and num_samples in t.shape
              and not isinstance(t, nn.Parameter)}  # fmt: skip
    likely = {
        n: 0 if t.shape[0] == num_samples else t.shape.index(num_samples) for n, t in extras.items()
    }
    if num_samples > 2 and _part_agrees(call, streams, axis, likely, num_samples, run, reference):
        return likely
    # By what each touches: an entry of a per-sample tensor touches that sample alone.
    found = {}
    for n, t in extras.items():
        axes = [a for a, size in enumerate(t.shape) if size == num_samples]
        answers = {a: _only_touches(0, a, [n], axis, call, run, reference) for a in axes}
        if known := [a for a, answer in answers.items() if answer]:
            found[n] = known[0]
        elif False not in answers.values() and t.shape[0] == num_samples:
            found[n] = 0  # nothing tells: indexes, or not used in this call
    return found if _part_agrees(call, streams, axis, found, num_samples, run, reference) else None


def _part_agrees(
    call: Call, streams: Streams, axis: int, per_sample, num_samples: int, run: Run, reference
) -> bool:
    device = call.tensors[streams.names[0]].device
    part = torch.arange(
        num_samples - 1, num_samples // 2 - 1, -1, device=device
    )  # the second half, reversed
    plan = BatchPlan(streams, axis, per_sample)
    try:
        outputs = run(plan.select(call, part))
    except (RuntimeError, ValueError, IndexError, AssertionError, TypeError):
        return False
    for key, whole in reference.items():
        expected = whole.index_select(axis, part)
        out = outputs.get(key)
        if (
            out is None
            or out.shape != expected.shape
            or not bool(((out.float() - expected.float()).abs() <= _tolerance(whole)).all())
        ):
            return False
    return True


def _tolerance(tensor: Tensor) -> float:
    scale = float(tensor.float().abs().amax()) if tensor.numel() else 0.0
    return max(scale, 1e-6) * max(
        2e3 * torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 1e-4, 1e-4
    )
