"""Counts the steps by which temperatures and weights anneal."""

from __future__ import annotations

from lightning.pytorch import Trainer


class StepCount:
    """Counts the batches of a fit in which an optimizer stepped. A restored count continues.

    Attributes:
        num_stepped: Number of those batches so far.
        num_before: `num_stepped` when the fit started.
        follows_trainer: Whether `current` returns the Trainer's step instead, which counts the
            steps of all optimizers.
    """

    def __init__(self) -> None:
        self.num_stepped = self.num_before = 0
        self.follows_trainer = False
        self._restored = False

    def start(self) -> None:
        """Start a fit: from 0, or from the count that `restore` set."""
        if not self._restored:
            self.num_stepped = 0
        self._restored = False
        self.num_before = self.num_stepped

    def restore(self, num_stepped: int) -> None:
        """Continue from `num_stepped`, which a checkpoint stores."""
        self.num_stepped, self._restored = num_stepped, True

    def current(self, trainer: Trainer) -> int:
        """The step that annealing is at."""
        return trainer.global_step if self.follows_trainer else self.num_stepped


def check_anneal_steps(anneal_steps: int | None) -> None:
    """Raise `ValueError` unless `anneal_steps` is None or an integer >= 1."""
    if anneal_steps is not None and not (isinstance(anneal_steps, int) and anneal_steps >= 1):
        raise ValueError(
            f"anneal_steps is {anneal_steps}; give a number of optimizer steps >= 1, or None to "
            "anneal over the whole fit."
        )
