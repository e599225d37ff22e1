"""Depth pruning of a model, without Lightning: plan, check, start, freeze, record.

Example::

    pruner = DepthPruner("1:2")
    gates = pruner.start(model)
    steps = GateOptimizer()
    steps.start(gates)
    for step, (x, y) in enumerate(batches):
        steps.anneal(step, num_steps)
        gates.redraw()
        loss_fn(model(x), y).backward()
        steps.set_aside()
        optimizer.step()
        steps.step()
    shallow = pruner.freeze(model)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from tinyfusion_pl.pruning.adapters import WeightUpdate, check_delta_w
from tinyfusion_pl.pruning.blocks import get_module, get_stack, unwrap
from tinyfusion_pl.pruning.budget import Budget
from tinyfusion_pl.pruning.caches import restore_caches, turn_off_caches
from tinyfusion_pl.pruning.compiled import (
    Compiler,
    Opened,
    close_compiled,
    on_the_way,
    open_compiled,
    uncompiled,
)
from tinyfusion_pl.pruning.copies import copy_model, copy_to_meta
from tinyfusion_pl.pruning.decision import Decision
from tinyfusion_pl.pruning.discovery import Discovery, discover
from tinyfusion_pl.pruning.drops import earliest_drops
from tinyfusion_pl.pruning.gates import DepthGates, remove_gates
from tinyfusion_pl.pruning.library_configs import check_library_config
from tinyfusion_pl.pruning.plan import Plan, find_paths, make_plan
from tinyfusion_pl.pruning.relaxations import Relaxation
from tinyfusion_pl.pruning.sharding import is_sharded, whole_copy
from tinyfusion_pl.pruning.surgery import remove_blocks


class DepthPruner:
    """Depth pruning of one model.

    Args:
        held: Whether the model is a part of the module that is given (of a LightningModule), and
            the shallow model is to be of that part: the child that holds all stacks.
        relaxation: Default: the published one.
        distribution: In place of `relaxation`, see `StackGates`.
        pattern and the others: See `DepthPruningCallback`.
    """

    def __init__(
        self, pattern: str | Mapping[str, str] | None = None, *, keep: Any = None, stacks: str | Sequence[str] | None = None,
        weight_update: Any = "lora", delta_w: str = "discard", units: Any = None, streams: Mapping[str, Sequence[str]] | None = None,
        gather: bool = True, scaling: float = 100.0, init: float = 0.02, average_decay: float = 0.999, tau: float = 4.0,
        relaxation: Relaxation | None = None, distribution: Any = None, held: bool = False,
    ) -> None:  # fmt: skip
        self.relaxation = relaxation or Relaxation()
        self.budget = Budget(
            pattern, keep, enumerated=distribution is None and self.relaxation.enumerates
        )
        if not (_is_number(scaling) and scaling > 0):
            raise ValueError(f"These must be numbers > 0: scaling={scaling} (published: 100).")
        if not (_is_number(average_decay) and 0 <= average_decay < 1):
            raise ValueError(
                f"average_decay is {average_decay}; give a number in [0, 1) (published: 0.999)."
            )
        if not _is_number(init):
            raise ValueError(
                f"init is {init}; give the number that every logit starts with (published: 0.02)."
            )
        check_delta_w(delta_w)
        self.stacks, self.delta_w, self.units, self.streams, self.tau = (
            stacks,
            delta_w,
            units,
            streams,
            tau,
        )
        self.weight_update = WeightUpdate(weight_update)
        self.options = {
            "scaling": scaling,
            "init": init,
            "average_decay": average_decay,
            "gather": gather,
        }
        self.distribution, self.held = (
            distribution or self.relaxation.factory(scaling=scaling),
            held,
        )
        self.root = ""
        self.remarks: list[
            str
        ] = []  # on what was found and left out, and on a model whose library will not open it
        self.gates: DepthGates | None = None
        self.found: Discovery | None = None  # where the stacks were not named
        self._caches: dict[
            tuple[str, str], bool
        ] = {}  # use_cache and its like of each config, as they were
        self._outline: nn.Module | None = None  # of the model as it was, without memory
        self._opened: Opened = []  # compiled modules around the model, which run eagerly meanwhile

    # -- planning -------------------------------------------------------------------------------
    def find(self, module: nn.Module) -> list[str]:
        """Paths of the stacks to prune in `module`.

        Raises:
            ValueError: when there are none.
        """
        return find_paths(module, self.stacks, budget=self.budget)

    def finds(self, module: nn.Module) -> bool:
        """Whether the blocks that are meant are in `module`."""
        try:
            self.find(module)
        except ValueError:
            return False
        return True

    def plan(self, module: nn.Module) -> Plan:
        """Find out whether pattern, stacks, units and streams fit `module`, and change nothing.

        Raises:
            ValueError: when they do not; says what would.
        """
        return make_plan(
            module,
            self.find(module),
            budget=self.budget,
            units=self.units,
            streams=self.streams,
            held=self.held,
        )

    def check(self, module: nn.Module) -> None:
        """As `plan`; and find out whether the adapters go onto the model.

        Raises:
            ValueError: when they do not.
        """
        self.weight_update.check(get_module(module, self.plan(module).root))

    def start(
        self, module: nn.Module, *, rank: int = 0, compiler: Compiler | None = None
    ) -> DepthGates:
        """Put adapters and gates on the blocks of `module`, in place.

        Args:
            module: The model, or what holds it.
            rank: Rank of this process.
            compiler: Compiles the blocks; default: what ``torch.compile`` was told on the way to
                them.

        Raises:
            ValueError: as `plan`; `module` is then as it was.
        """
        plan = self.plan(module)
        model = get_module(module, plan.root)
        # Before the weight update freezes what would then look left out.
        self.found = (
            discover(module) if self.stacks is None and not self.budget.is_by_path else None
        )
        remarks = [self.found.describe()] if self.found is not None else []
        self._outline = copy_to_meta(model)  # also because `freeze` must be able to copy it
        self.weight_update.start(model)
        try:
            gates = DepthGates(model, plan.patterns, units=plan.units, streams=plan.streams, tau=self.tau, rank=rank,
                               distribution=self.distribution, **self.options)  # fmt: skip
            # A structure that the search might decide for: its config is tried now, not after
            # training.
            remarks.append(
                check_library_config(
                    model, {g.path: g.get_blocks(earliest_drops(g)) for g in gates.stacks}
                )
            )
        except Exception:
            remove_gates(model)
            self.weight_update.finish(model, delta_w="discard")
            raise
        self.root, self.gates, self.remarks = (
            plan.root,
            gates,
            [remark for remark in remarks if remark],
        )
        self._caches = turn_off_caches(model)
        self.see_through(module, compiler)
        return gates

    def see_through(self, module: nn.Module, compiler: Compiler | None = None) -> None:
        """Run what ``torch.compile`` wrapped around gated blocks eagerly, and the blocks compiled; again after more was compiled.

        Args:
            module: What `start` was called with.
            compiler: Of something around `module`.
        """
        self.gates.see_through(
            self.model(module),
            open_compiled(on_the_way(module, self.root), self._opened) or compiler,
        )

    def model(self, module: nn.Module) -> nn.Module:
        """The part of `module` that holds all gated stacks."""
        return get_module(module, self.root)

    def paths(self) -> list[str]:
        """Paths of the gated stacks in the module that `start` was called with."""
        return [
            f"{self.root}.{gates.path}" if self.root else gates.path for gates in self.gates.stacks
        ]

    def check_attached(self, module: nn.Module) -> None:
        """`ValueError` where the gated blocks are no longer those of `module`, which was built further since `start`."""
        for path in self.paths():
            blocks = list(get_stack(module, path))
            if not any(
                gated.block is unwrap(block)
                for gated in self.gates.gated_forwards
                for block in blocks
            ):
                raise ValueError(f"The blocks at '{path}' were replaced after gates were put on them. Build the model once: in __init__, "
                                 "setup or configure_model.")  # fmt: skip
        if self.found is not None:
            now = discover(module)
            seen = {*self.found.stacks, *self.found.left_out}
            new = [
                p
                for p in (*now.stacks, *(p for p, why in now.left_out.items() if why != "frozen"))
                if p not in seen
            ]
            if new:
                raise ValueError(f"Gates were put on {', '.join(self.paths())}, all that looked like blocks before the model was whole; "
                                 f"now {', '.join(new)} does. Name the block list: stacks={new[0]!r}.")  # fmt: skip

    # -- ending ---------------------------------------------------------------------------------
    def stop(self, module: nn.Module) -> None:
        """Take gates and adapters off `module`, which gets its original weights back or keeps what it learned (`delta_w`)."""
        self._restore(self.model(module), delta_w=self.delta_w)
        close_compiled(self._opened)
        self.gates = None

    def freeze(self, module: nn.Module, decision: Decision | None = None) -> nn.Module:
        """A copy of the model without gates, adapters and dropped blocks; `module` itself stays as it is."""
        shallow = self._copy(module, delta_w=self.delta_w)
        return remove_blocks(shallow, (decision or self.gates.decide()).kept_blocks)

    def dense(self, module: nn.Module) -> nn.Module:
        """A copy of the model with its original weights, without gates and adapters; `module` itself stays as it is."""
        return self._copy(module, delta_w="discard")

    def _copy(self, module: nn.Module, *, delta_w: str) -> nn.Module:
        model = self.model(module)
        copied = whole_copy(self._outline, model) if is_sharded(model) else copy_model(model)
        for name, child in list(copied.named_children()):
            if isinstance(
                child, DepthGates
            ):  # the module that holds the stacks holds the gates too
                delattr(copied, name)
        self._restore(copied, delta_w=delta_w)
        return uncompiled(copied)

    def _restore(self, model: nn.Module, *, delta_w: str) -> None:
        remove_gates(model)
        self.weight_update.finish(model, delta_w=delta_w)
        restore_caches(model, self._caches)

    def configuration(self) -> dict[str, Any]:
        """The settings, for a record."""
        return {
            "weight_update": self.weight_update.describe(),
            "delta_w": self.delta_w,
            **self.options,
            **self.relaxation.configuration(),
        }


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
