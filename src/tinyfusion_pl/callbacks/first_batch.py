"""Verifies gates on the first batch of a fit and reports how they run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from tinyfusion_pl.callbacks.gate_setup import report_unverified
from tinyfusion_pl.pruning import DepthGates
from tinyfusion_pl.pruning.first_call import FirstCallCheck
from tinyfusion_pl.pruning.stack_gates import StackGates


class FirstBatch:
    """Compares gated with removed blocks in the first call, and logs how samples are gathered.

    A batch whose loss is not finite shows nothing: the next one is used.

    Args:
        verify: Whether to compare gated with removed blocks.
    """

    def __init__(self, *, verify: bool) -> None:
        self.verify = verify
        self._described = False
        self._check: FirstCallCheck | None = None

    def expect(self, pl_module: LightningModule, gates: DepthGates, paths: Sequence[str]) -> None:
        """Verify the next training call of `pl_module`.

        Args:
            pl_module: The module that trains.
            gates: The gates on its blocks.
            paths: Path in `pl_module` of each gated stack.
        """
        self._described = False
        if self.verify:
            # ModuleList hides the type of its elements.
            stacks = [cast(StackGates, stack) for stack in gates.stacks]
            of_stacks = {stack.path: path for stack, path in zip(stacks, paths, strict=True)}
            self._check = FirstCallCheck(pl_module, gates, of_stacks)

    def ran(self, gates: DepthGates, loss: Tensor) -> None:
        """Report a batch that ended in `loss`, unless an earlier one was reported."""
        gated_blocks_ran = any(gated.plans for gated in gates.gated_forwards)
        if not self._described and gated_blocks_ran and bool(loss.isfinite().all()):
            self._described = True
            rank_zero_info(f"DepthPruningCallback: {gates.describe_batches()}")
        if self._check is not None and self._described and not self._check.postponed:
            report_unverified(self._check.unverified)
            self.close()

    def close(self) -> None:
        """Remove the hooks of the check."""
        if self._check is not None:
            self._check.remove()
            self._check = None
