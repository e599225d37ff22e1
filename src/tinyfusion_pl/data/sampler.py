"""The order of training samples: an endless stream, a pure function of seed and position."""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, cast

import numpy as np
from torch.utils.data import DataLoader, DistributedSampler


@lru_cache(maxsize=2)
def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """Return the permutation of 0..num_samples-1 of an epoch."""
    order = np.random.default_rng((seed, epoch)).permutation(num_samples)
    order.flags.writeable = False  # the cache shares the array
    return order


class StreamSampler(DistributedSampler):
    """The share of one process in a stream of epochs, each a new permutation of all samples.

    Draw i of the stream is sample ``epoch_order(i // num_samples)[i % num_samples]``; process
    `rank` of `num_replicas` takes every num_replicas-th draw. It subclasses `DistributedSampler` so
    that Lightning does not replace it, whatever its `use_distributed_sampler`.

    Args:
        num_samples: Number of samples in the dataset.
        num_draws: Draws per iteration and process.
        seed: Seed of the permutations.
        rank: Rank of this process.
        num_replicas: Number of processes.
        first_draw: Returns the draw at which an iteration starts; called each time, so that a
            resumed or second pass continues where the last one ended.
        with_draws: Yield ``(draw, index)`` rather than the index of the sample.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        num_draws: int,
        seed: int = 0,
        rank: int = 0,
        num_replicas: int = 1,
        first_draw: Callable[[], int] = lambda: 0,
        with_draws: bool = False,
    ) -> None:
        samples = cast(Any, range(num_samples))  # only its length is used
        super().__init__(samples, num_replicas=num_replicas, rank=rank, seed=seed)
        self.num_samples_per_epoch = num_samples
        self.num_draws = num_draws
        self.first_draw = first_draw
        self.with_draws = with_draws

    def __iter__(self) -> Iterator[int] | Iterator[tuple[int, int]]:
        first = self.first_draw() + self.rank
        for i in range(first, first + self.num_draws * self.num_replicas, self.num_replicas):
            yield (i, self.draw(i)) if self.with_draws else self.draw(i)

    def __len__(self) -> int:
        return self.num_draws

    def draw(self, i: int) -> int:
        """Return the sample index of draw i of the whole stream."""
        num_samples = self.num_samples_per_epoch
        epoch, position = divmod(i, num_samples)
        return int(epoch_order(num_samples, self.seed, epoch)[position])


class StreamLoader(DataLoader):
    """A `DataLoader` over a `StreamSampler`; its state tells Lightning that it resumes mid-epoch.

    The data module restores the position, because Lightning restores it before the loader exists.
    """

    def state_dict(self) -> dict[str, int]:
        """Return the position in the stream."""
        return {"num_draws": self._first_draw()}

    def _first_draw(self) -> int:
        assert isinstance(self.sampler, StreamSampler)
        return self.sampler.first_draw()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Check that the data module restored the same position."""
        assert state["num_draws"] == self._first_draw(), (
            "the data module and the loader disagree on the position"
        )
