"""Random number generators that differ between ranks and are saved in the checkpoint."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule


class OwnRandomness(LightningModule):
    """A module whose ranks draw different random numbers and continue their sequences on resume.

    ``seed_everything`` seeds all ranks equally, so timesteps, noise and dropped labels would be the
    same on each. The generators of Python, NumPy and torch (CPU and the rank's GPU) are saved for
    each rank. Resuming on a different number of ranks seeds them anew.
    """

    _saved_random_states: list[dict[str, Any]] | None = None

    def on_train_start(self) -> None:
        """Restore the generators of this rank, or seed them if the rank is not 0."""
        saved, self._saved_random_states = self._saved_random_states, None
        if saved is not None and len(saved) == self.trainer.world_size:
            set_random_state(saved[self.trainer.global_rank])
        elif self.trainer.global_rank > 0:
            seed = (torch.initial_seed() + 1_000_003 * self.trainer.global_rank) % 2**63
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the generator states of all ranks."""
        states: list[Any] = [random_state()]
        if self.trainer.world_size > 1:
            states = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(states, random_state())
        checkpoint["random_states"] = states

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Read the generator states; `on_train_start` restores them."""
        self._saved_random_states = checkpoint.get("random_states")


def random_state() -> dict[str, Any]:
    """Generator states of this process, in types that load with ``weights_only=True``."""
    version, internal, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=True)
    assert isinstance(numpy_state, tuple)
    kind, keys, *rest = numpy_state
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": [version, list(internal), gauss],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore generator states that `random_state` returned."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
