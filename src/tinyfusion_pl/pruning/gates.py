"""Gates on a model's blocks: the learnable distribution over what stays (TinyFusion, arXiv 2412.01199, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion_pl.pruning.blocks import by_path, get_stack, get_units, unwrap
from tinyfusion_pl.pruning.calls import Call
from tinyfusion_pl.pruning.compiled import (
    Compiler,
    Opened,
    close_compiled,
    open_compiled,
    ways_to_stack,
)
from tinyfusion_pl.pruning.decision import Decision
from tinyfusion_pl.pruning.discovery import resolve_stacks
from tinyfusion_pl.pruning.gating import GatedForward
from tinyfusion_pl.pruning.library_configs import fixed_blocks
from tinyfusion_pl.pruning.masks import Masks, Noise
from tinyfusion_pl.pruning.patterns import Pattern
from tinyfusion_pl.pruning.stack_gates import DistributionFactory, StackGates


class DepthGates(nn.Module):
    """Gates on the blocks of `model`: installs them on construction, holds their logits and masks, states the decision.

    Blocks keep their place, class and parameter names; only their ``forward`` is replaced on the
    instance. In training mode each sample of a batch has a mask of its own, drawn by `redraw`,
    which must be called at the start of each batch (the callback does it); forward passes of equal
    batch size share the masks of their batch. In evaluation mode the current decision holds. The
    logits are in `parameters()` but not in `state_dict()`, so that a model's checkpoint keeps its
    keys: `gate_state` has them.

    Args:
        model: The model.
        pattern: ``"N:M"`` (N kept of M), or a mapping from stack path to pattern.
        stacks: Path or paths of the block lists in `model`; default: found.
        units: For a stack, lists of block indices that only go together (a mapping from path, or
            one for all); default: what the model states, else every block on its own.
        streams: For a stack path, the names of the block's arguments that are hidden states, in the
            order in which the block returns them; default: found (see `find_streams`).
        scaling, init, average_decay, distribution: See `StackGates`.
        tau: Temperature to start with, > 0; set the attribute to anneal (published: 4 -> 0.1).
        rank: Rank of this process: processes with equally seeded generators still draw different
            masks.
        gather: Run dropped samples without a graph (exact, cheaper). False: the plain formula
            throughout.

    Raises:
        ValueError: for a pattern that does not fit, a missing stack, or numbers out of range.
    """

    def __init__(
        self, model: nn.Module, pattern: str | Pattern | Mapping[str, str], *, stacks: str | Sequence[str] | None = None,
        units: Sequence[Sequence[int]] | Mapping[str, Sequence[Sequence[int]]] | None = None,
        streams: Mapping[str, Sequence[str]] | None = None, scaling: float = 100.0, init: float = 0.02, average_decay: float = 0.999,
        distribution: DistributionFactory | None = None, tau: float = 4.0, rank: int = 0, gather: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        paths = resolve_stacks(model, stacks, pattern=pattern)
        patterns, all_units = by_path(pattern, paths, "pattern"), by_path(units, paths, "units")
        self.stacks = nn.ModuleList(
            StackGates(
                path, len(get_stack(model, path)), patterns[path], units=get_units(model, path, all_units[path]), scaling=scaling,
                init=init, average_decay=average_decay, index=i, distribution=distribution,
                fixed=fixed_blocks(model, path),
            ) for i, path in enumerate(paths)
        )  # fmt: skip
        if unknown := [path for path in streams or {} if path not in paths]:
            raise ValueError(
                f"streams names {unknown}, where there is no gated stack; the stacks are {paths}."
            )
        self.given_streams = {
            path: [names] if isinstance(names, str) else list(names)
            for path, names in (streams or {}).items()
        }
        self.masks, self.gather, self.bypassed = Masks(tau=tau, rank=rank), gather, False
        self.recorder: Callable[[GatedForward, Call], Any] | None = (
            None  # sees each call of a gated block
        )
        self._kept: dict[str, set[int]] | None = None
        self.rows: dict[
            str, int
        ] = {}  # of stacks whose blocks see another batch than the model (frames, patches)
        self._without_graph: set[str] = (
            set()
        )  # blocks of which reentrant checkpointing ran a forward in this batch
        # compiled modules that run eagerly while gates are on their blocks
        self.opened: Opened = []
        self._install(model)

    # -- installation ---------------------------------------------------------------------------
    def _install(self, model: nn.Module) -> None:
        if next(gated_forwards(model), None) is not None:
            raise ValueError(
                "This model carries gates already; remove them first (remove_gates) or use the ones it has."
            )
        self.gated_forwards: list[GatedForward] = []
        for gates in self.stacks:
            stack = get_stack(model, gates.path)
            for unit, indices in enumerate(gates.units):
                for index in indices:
                    self.gated_forwards.append(
                        GatedForward(
                            self, gates, unwrap(stack[index]), unit, name=f"{gates.path}.{index}"
                        )
                    )
        for gated in self.gated_forwards:
            gated.install()
        self.see_through(model)

    def see_through(self, model: nn.Module, outer: Compiler | None = None) -> None:
        """Compile the gated blocks, each by itself, where ``torch.compile`` was used on them or on what holds them.

        Args:
            model: The model.
            outer: Compiler of something around `model`.
        """
        for gates in self.stacks:
            around = open_compiled(ways_to_stack(model, gates.path), self.opened) or outer
            stack = get_stack(model, gates.path)
            mine = {id(g.block): g for g in self.gated_forwards if g.gates is gates}
            for block in stack:
                if (gated := mine.get(id(unwrap(block)))) is not None:
                    gated.compile(
                        open_compiled(
                            [block] if block is gated.block else [block, gated.block], self.opened
                        )
                        or around
                    )

    def __getstate__(self) -> dict[str, Any]:
        # A copy's compiled modules are made anew, and compiled; they hold its blocks, which must
        # not be asked for while they are copied.
        return {**self.__dict__, "_without_graph": set(), "opened": []}

    @contextmanager
    def bypass(self) -> Iterator[None]:
        """Inside, blocks run as if they carried no gates."""
        before, self.bypassed = self.bypassed, True
        try:
            yield
        finally:
            self.bypassed = before

    # -- masks ----------------------------------------------------------------------------------
    def redraw(self) -> None:
        """Draw the masks of the next batch. Call it at the start of each one."""
        self._without_graph.clear()
        self.masks.redraw()

    def fix_noise(self, noise: Noise | None) -> None:
        """Use this noise for the draws to come: for each stack path a list of (N, num_logits), one a group; None: draw again."""
        self.masks.fix_noise(noise)

    @property
    def forced(self) -> bool:
        """Whether a structure is forced on all samples (`Masks.forced`)."""
        return self.masks.is_forced

    @property
    def tau(self) -> float:
        """Temperature of the Gumbel-softmax, > 0; takes effect at the next draw."""
        return self.masks.tau

    @tau.setter
    def tau(self, value: float) -> None:
        self.masks.tau = value

    def check_checkpointing(self, gated: GatedForward, hidden: Tensor) -> None:
        """`RuntimeError` for reentrant activation checkpointing under DDP, which forbids what it does to the logits."""
        if not torch.is_grad_enabled():
            if hidden.requires_grad:  # only reentrant checkpointing runs a forward like this
                self._without_graph.add(gated.name)
        elif (
            gated.name in self._without_graph
            and torch._C._current_graph_task_id() != -1
            and _num_processes() > 1
        ):
            raise RuntimeError(
                "Reentrant activation checkpointing gives the gate logits a gradient at each block, which DDP does not allow. Use "
                "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
            )

    def keeps(self, gated: GatedForward) -> bool:
        """Whether the current decision keeps the block (evaluation mode)."""
        if self._kept is None:
            self._kept = {gates.path: set(gates.kept_units()) for gates in self.stacks}
        return gated.unit in self._kept[gated.gates.path]

    def describe_batches(self) -> str:
        """Which blocks run with their samples gathered and which by the plain formula, and why; one line, after a forward pass."""
        parts = []
        for gates in self.stacks:
            mine = [gated for gated in self.gated_forwards if gated.gates is gates and gated.plans]
            reasons = {
                gated.name: why
                for gated in mine
                for plan in gated.plans.values()
                if (why := gated.plain_because(plan))
            }
            text = f"{gates.path}: {len(mine) - len(reasons)} blocks gathered"
            if reasons:
                name, reason = next(iter(reasons.items()))
                text += f", {len(reasons)} by the plain formula ({name}: {reason})"
            if gates.path in self.rows:
                text += f" (a mask for each of the {self.rows[gates.path]} rows that they see, which are not the samples of the call)"
            streams = {tuple(plan.streams.names) for gated in mine for plan in gated.plans.values()}
            parts.append(
                f"{text}; hidden states: {' | '.join(', '.join(names) for names in sorted(streams))}"
            )
        return "; ".join(parts)

    # -- learning and decision ------------------------------------------------------------------
    def logits(self) -> list[nn.Parameter]:
        """All gate logits."""
        return [logits for gates in self.stacks for logits in gates.logits]

    def update_average(self) -> None:
        """One step of the exponential average of all logits."""
        self._kept = None
        for gates in self.stacks:
            gates.update_average()

    def decide(self) -> Decision:
        """The current decision of every stack, with probabilities, confidence and entropy."""
        return Decision({gates.path: gates.decide() for gates in self.stacks})

    def gate_state(self) -> dict[str, Any]:
        """Logits, averages, multipliers and temperature, on CPU, for a checkpoint."""
        return {"tau": self.tau, "stacks": {g.path: g.state() for g in self.stacks}}

    @torch.no_grad()
    def load_gate_state(self, state: dict[str, Any]) -> None:
        """Take back what `gate_state` gave.

        Raises:
            ValueError: when stacks, patterns or distributions differ.
        """
        mine = {g.path: str(g.pattern) for g in self.stacks}
        theirs = {path: stack["pattern"] for path, stack in state["stacks"].items()}
        if mine != theirs:
            raise ValueError(
                f"The checkpoint's gates are for {theirs}, these are for {mine}; resume with the pattern it was made with."
            )
        self.tau, self._kept = state["tau"], None
        for gates in self.stacks:
            gates.load_state(state["stacks"][gates.path])


def gated_forwards(model: nn.Module) -> Iterator[GatedForward]:
    """The gated forwards that were installed on blocks of `model`."""
    for module in model.modules():
        if isinstance(
            gated := getattr(module.__dict__.get("forward"), "__self__", None), GatedForward
        ):
            yield gated


def find_gates(model: nn.Module) -> DepthGates | None:
    """The gates that were installed on blocks of `model`, if any."""
    return next((gated.owner for gated in gated_forwards(model)), None)


def remove_gates(model: nn.Module) -> None:
    """Give every block of `model` its own forward back."""
    owners = {}
    for gated in list(gated_forwards(model)):
        gated.remove()
        owners[id(gated.owner)] = gated.owner
    for owner in owners.values():
        close_compiled(owner.opened)


def _num_processes() -> int:
    distributed = torch.distributed
    return (
        distributed.get_world_size()
        if distributed.is_available() and distributed.is_initialized()
        else 1
    )
