"""One check before the first optimizer step: does dropping blocks by gates give what cutting them out gives?

The first call that the training step makes to the gated model is replayed, quietly (without
dropout or a graph), under few structures in which every group drops something: with gates, and
with the lists of blocks shortened in place. Equal outputs mean that nothing beside the blocks
depends on their number or place. Then the gradients of one block of each stack are compared,
gathered against plain. It costs a few forward passes and no copy of the weights.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion_pl.pruning.batch_axes import SAMPLES_MIX
from tinyfusion_pl.pruning.calls import Call, map_tree, quiet, unwrapped
from tinyfusion_pl.pruning.drops import (
    Structure,
    earliest_drops,
    joint_structures,
    mixed_structures,
)
from tinyfusion_pl.pruning.gates import DepthGates
from tinyfusion_pl.pruning.gating import GatedForward
from tinyfusion_pl.pruning.gradient_check import check_gradients
from tinyfusion_pl.pruning.sharding import gathered
from tinyfusion_pl.pruning.stack_gates import StackGates
from tinyfusion_pl.pruning.surgery import blocks_removed

SWITCH_OFF = "If this is intended, pass verify=False."

Recorded = dict[str, tuple[GatedForward, Call]]


def verify(
    module: nn.Module,
    owner: DepthGates,
    args: tuple,
    kwargs: dict[str, Any],
    *,
    paths: Mapping[str, str] | None = None,
) -> bool:
    """Check that gates on `module` do what cutting blocks out does.

    Args:
        module: The module that was called; the stacks are inside it.
        owner: The gates.
        args, kwargs: The call.
        paths: The stacks to check, by the paths that the gates know, and their paths in `module`;
            default: all, under equal paths.

    Returns:
        Whether it could be checked: a call whose output is not finite, with gates and without the
            blocks alike, shows nothing.

    Raises:
        ValueError: where they differ; names the stack, the block, and what couples them.
    """
    paths = {g.path: g.path for g in owner.stacks} if paths is None else dict(paths)
    gates = [g for g in owner.stacks if g.path in paths]
    replay = _Replay(unwrapped(module), owner, args, kwargs, paths)
    try:
        recorded, output = replay.gated({g.path: earliest_drops(g) for g in gates})
    except (ValueError, RuntimeError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(
            f"The first call of {type(module).__name__} could not be replayed with blocks dropped: {error}"
        ) from error
    if next(_tensors(output), None) is None:
        raise ValueError(
            f"{type(module).__name__} returned no tensor that could be compared. {SWITCH_OFF}"
        )
    for stack in gates:
        _check_batch(
            owner,
            stack,
            [pair for pair in recorded.values() if pair[0].gates is stack],
            Call(None, args, kwargs),
        )
    for structure in joint_structures(gates):
        if problem := replay.differs(structure):
            raise ValueError(_localize(replay, gates, structure, problem))
    for structure in mixed_structures(gates):
        if problem := replay.differs(structure):
            raise ValueError(_of_both(replay, structure, problem))
    if not all(x.isfinite().all() for x in _tensors(output)):
        return False
    for stack in gates:
        first = next((pair for pair in recorded.values() if pair[0].gates is stack), None)
        if first is not None:
            with gathered(first[0].block):
                check_gradients(*first)
    return True


class _Replay:
    """Runs the same call of a module again, with gates or without blocks."""

    def __init__(
        self,
        module: nn.Module,
        owner: DepthGates,
        args: tuple,
        kwargs: dict[str, Any],
        paths: dict[str, str],
    ) -> None:
        self.module, self.owner, self.args, self.kwargs, self.paths = (
            module,
            owner,
            args,
            kwargs,
            paths,
        )
        self.blocks = {g.path: g for g in owner.stacks}

    def _run(self) -> Any:
        def fresh(_: str, leaf: Any) -> Any:  # the module may write into what it is given
            if isinstance(leaf, Tensor):
                return leaf.detach().clone()
            with suppress(Exception):
                return copy.deepcopy(leaf) if Call(None, (leaf,), {}).remembering else leaf
            return leaf

        args = tuple(map_tree(fresh, each) for each in self.args)
        kwargs = {k: map_tree(fresh, each) for k, each in self.kwargs.items()}
        with quiet(self.module, seed=0), torch.compiler.set_stance("force_eager"):
            return self.module.forward(*args, **kwargs)

    @contextmanager
    def _recording(self) -> Iterator[Recorded]:
        recorded: Recorded = {}
        self.owner.recorder = lambda gated, call: recorded.setdefault(gated.name, (gated, call))
        try:
            yield recorded
        finally:
            self.owner.recorder = None

    def _whole(self, kept: Mapping[str, list[int]]) -> dict[str, list[int]]:
        return {path: list(kept.get(path, range(len(g.units)))) for path, g in self.blocks.items()}

    def gated(self, kept: Mapping[str, list[int]]) -> tuple[Recorded, Any]:
        """Calls of the blocks, and the output, with gates under one structure; stacks not named keep all."""
        with self._recording() as recorded, self.owner.masks.forced(self._whole(kept)):
            return recorded, self._run()

    def cut(self, kept: Mapping[str, list[int]]) -> tuple[Recorded, Any]:
        """The same with the other blocks cut out."""
        inside = {
            self.paths[path]: self.blocks[path].get_blocks(units) for path, units in kept.items()
        }
        with (
            self._recording() as recorded,
            self.owner.bypass(),
            blocks_removed(self.module, inside),
        ):
            return recorded, self._run()

    def differs(self, kept: Mapping[str, list[int]]) -> str:
        """How gated and cut differ under a structure; empty where they do not."""
        mine, gated = self.gated(kept)
        try:
            theirs, cut = self.cut(kept)
        except Exception as error:  # whatever a foreign forward raises
            return f"without the dropped blocks its forward fails ({type(error).__name__}: {error})"
        a, b = list(_tensors(gated)), list(_tensors(cut))
        if len(a) != len(b) or any(x.shape != y.shape for x, y in zip(a, b)):
            return (f"it returns {len(a)} tensors with gates and {len(b)} without the blocks (or of other shapes): outputs of every layer "
                    "(output_hidden_states, output_attentions) must be off")  # fmt: skip
        if any((x.isfinite() != y.isfinite()).any() for x, y in zip(a, b)):
            return f"other values are not finite with gates than without the blocks{_first_difference(mine, theirs)}"
        distance = max(
            (_largest((x.float() - y.float())[y.isfinite()]) for x, y in zip(a, b)), default=0.0
        )
        scale = max((_largest(y.float()[y.isfinite()]) for y in b), default=0.0)
        eps = max(torch.finfo(y.dtype).eps if y.is_floating_point() else 0.0 for y in b)
        if distance <= max(scale, 1e-6) * max(1e-4, 100 * eps):
            return ""
        return f"the outputs differ by {distance:.3g} (they reach {scale:.3g}){_first_difference(mine, theirs)}"


def _first_difference(mine: Recorded, theirs: Recorded) -> str:
    """The first argument of a kept block that is another with gates than without the dropped blocks."""
    for name, (gated, call) in mine.items():
        if name not in theirs:
            continue
        other = theirs[name][1]
        for argument, tensor in call.tensors.items():
            its = other.tensors.get(argument)
            same = its is not None and its.shape == tensor.shape
            if not same or (
                its.float() - tensor.float()
            ).abs().max() > 1e-4 * tensor.float().abs().max().clamp_min(1e-6):
                streams = {n for plan in gated.plans.values() for n in plan.streams.names}
                kind = "its hidden states" if argument in streams else "the argument"
                return f"; {kind} '{argument}' of block {name} depends on which blocks come before it, beyond what they compute"
    return ""


def _localize(replay: _Replay, gates: list[StackGates], structure: Structure, problem: str) -> str:
    guilty, unit = gates[0], None
    for stack in gates:
        if found := replay.differs({stack.path: structure[stack.path]}):
            guilty, problem = stack, found
            break
    dropped = [u for u in range(len(guilty.units)) if u not in structure[guilty.path]]
    for each in dropped:
        if found := replay.differs(
            {guilty.path: [u for u in range(len(guilty.units)) if u != each]}
        ):
            unit, problem = each, found
            break
    which = (
        f"block {guilty.units[unit][0]}"
        if unit is not None
        else f"blocks {[i for u in dropped for i in guilty.units[u]]}"
    )
    lists = [
        k
        for k, v in replay.kwargs.items()
        if isinstance(v, (tuple, list)) and any(isinstance(i, Tensor) for i in v)
    ]
    inputs = (
        f" The call's {', '.join(map(repr, lists))} may be meant for blocks by their place."
        if lists
        else ""
    )
    return (
        f"Stack '{guilty.path}' cannot be pruned as it is called: with {which} dropped by gates and cut out of "
        f"{type(replay.module).__name__}, {problem}.{inputs} So the shallow model would not compute what the search measured. Name "
        "other stacks (stacks=), blocks that only go together (units=), the hidden states (streams=), or leave out the input that goes "
        f"to blocks by their place. {SWITCH_OFF}"
    )


def _of_both(replay: _Replay, structure: Structure, problem: str) -> str:
    """For stacks that may drop the blocks of equal places, but not of different ones."""
    stacks = [replay.blocks[path] for path in structure]
    dropped = ", ".join(
        f"{g.path} {[i for u, unit in enumerate(g.units) if u not in structure[g.path] for i in unit]}"
        for g in stacks
    )
    owners, depth = {g.path.rpartition(".")[0] for g in stacks}, stacks[0].num_blocks
    remedy = "Name one of them: stacks=PATH."
    if len(stacks) == 2 and len(owners) == 1 and stacks[1].num_blocks == depth:
        joined = f"{stacks[0].path}+{stacks[1].path.rpartition('.')[2]}"
        remedy += f" Or join them, blocks of one place as a unit: stacks={joined!r}, units=[[0, {depth}], [1, {depth + 1}], ...]."
    return (
        f"The stacks {' and '.join(repr(g.path) for g in stacks)} cannot be pruned each by its own pattern: where they drop blocks of "
        f"different places ({dropped}), by gates and cut out of {type(replay.module).__name__}, {problem}. Their blocks run in turn, so "
        f"that what stays would run in another order. {remedy} {SWITCH_OFF}"
    )


def _check_batch(
    owner: DepthGates, stack: StackGates, recorded: list[tuple[GatedForward, Call]], whole: Call
) -> None:
    """All blocks of a stack must see the same batch: a sample's mask is one for the whole stack."""
    sizes = {}
    for gated, call in recorded:
        plan = gated.plan(call)
        sizes.setdefault(call.tensors[plan.streams.names[0]].shape[plan.axis], gated.name)
    if len(sizes) > 1:
        seen = ", ".join(f"{size} in block {name}" for size, name in sizes.items())
        raise ValueError(f"The blocks of '{stack.path}' see batches of different sizes ({seen}), so that a sample has no one mask. Prune a "
                         "list of blocks that all run on the same batch.")  # fmt: skip
    num_rows = next(iter(sizes), None)
    if (
        num_rows is not None
        and whole.tensors
        and not any(num_rows in t.shape[:2] for t in whole.tensors.values())
    ):
        owner.rows[stack.path] = num_rows
        if any(
            SAMPLES_MIX in plan.plain_because
            for gated, _ in recorded
            for plan in gated.plans.values()
        ):
            raise ValueError(f"The blocks of '{stack.path}' see {num_rows} rows that mix, which are no samples of the call "
                             f"({whole.describe()}): samples packed into one row of tokens have no masks of their own. Pass them as a "
                             "padded batch.")  # fmt: skip


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def _tensors(output: Any) -> Iterator[Tensor]:
    """The floating-point tensors in what a module returned."""
    if isinstance(output, Tensor):
        if output.is_floating_point() or output.is_complex():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)
