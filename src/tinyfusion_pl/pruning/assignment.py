"""Many structures in one forward pass, each row of the batch under one of them.

Rows whose kept blocks so far are the same hold the same hidden states, so a block runs once for
each distinct prefix and its output
goes to all rows that share it: candidates are walked as a tree, whatever the model around the
blocks is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Run:
    """One block in one forward pass: the rows that run it, and where their outputs go.

    Attributes:
        rows: Rows of the batch that are run (R,).
        kept: Rows whose structure keeps the block (K,), K >= R.
        source: For each kept row, its place among those run (K,); None where they are the same
            rows.
    """

    rows: Tensor
    kept: Tensor
    source: Tensor | None


class Assignment:
    """Which structure each row of a batch is run under: row ``structure * num_samples + sample``.

    Args:
        kept: For each stack path, the units that each structure keeps: (num_structures, num_units)
            bool.
        num_samples: Rows of each structure.
        shared: Whether all structures are given the same samples in the same order, so that rows
            may share what they compute.

    Attributes:
        num_runs: Block runs so far, in blocks times samples.
    """

    def __init__(self, kept: Mapping[str, Tensor], *, num_samples: int, shared: bool) -> None:
        self.kept = {path: each.cpu().bool() for path, each in kept.items()}
        self.num_samples = num_samples
        self.num_structures = len(next(iter(self.kept.values())))
        # Structures of equal state have kept the same blocks so far.
        self._states = (
            torch.zeros(self.num_structures, dtype=torch.long)
            if shared
            else torch.arange(self.num_structures)
        )
        self._num_states = self.num_structures
        self.num_runs = 0

    def run(self, path: str, unit: int) -> Run | None:
        """What running one block of the unit means now; None where no structure keeps it. Call it once a block, in their order."""
        kept = self.kept[path][:, unit].nonzero().flatten()
        if not len(kept):
            return None
        states, source = self._states[kept].unique(return_inverse=True)
        first = torch.full((len(states),), len(kept)).scatter_reduce_(
            0, source, torch.arange(len(kept)), "amin"
        )
        self._states[kept] = self._num_states + source
        self._num_states += len(states)
        self.num_runs += len(states) * self.num_samples
        one_to_one = len(states) == len(kept)
        # In the order of the kept structures where each is run: then nothing has to be put in order
        # again.
        rows = self._rows(kept if one_to_one else kept[first])
        return Run(rows, self._rows(kept), None if one_to_one else self._rows(source))

    def _rows(self, structures: Tensor) -> Tensor:
        return (structures[:, None] * self.num_samples + torch.arange(self.num_samples)).flatten()
