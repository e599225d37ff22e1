"""The order of training: an endless stream of samples, a pure function of (seed, epoch), that can start anywhere."""

from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
from torch.utils.data import DataLoader, DistributedSampler


@lru_cache(maxsize=2)
def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of 0..num_samples-1 in which epoch `epoch` is seen."""
    order = np.random.default_rng((seed, epoch)).permutation(num_samples)
    order.flags.writeable = False  # the cache hands the same array to everyone
    return order


class StreamSampler(DistributedSampler):
    """One process's part of the stream of all epochs laid end to end, each epoch a fresh permutation of all samples.

    Draw i of the stream is sample ``epoch_order(i // num_samples)[i % num_samples]``; process `rank` of `num_replicas`
    takes every num_replicas-th draw. Iterating begins at draw ``first_draw()``, asked anew each time (so that a resumed
    or a second pass goes on where the last one ended), and gives `num_draws` draws, each as the sample's index or, `with_draws`, as
    ``(draw, index)``.

    It is a `DistributedSampler` so that Lightning, whatever its `use_distributed_sampler`, leaves it in place.
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
        super().__init__(range(num_samples), num_replicas=num_replicas, rank=rank, seed=seed)
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
        """The index of the sample that draw i of the whole stream sees."""
        epoch, place = divmod(i, len(self.dataset))
        return int(epoch_order(len(self.dataset), self.seed, epoch)[place])


class StreamLoader(DataLoader):
    """A `DataLoader` over a `StreamSampler`. Having a state tells Lightning that it can be resumed in mid-epoch.

    The position itself is restored through the data module, which Lightning does earlier, before a loader can exist.
    """

    def state_dict(self) -> dict[str, int]:
        return {"num_draws": self.sampler.first_draw()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        assert state["num_draws"] == self.sampler.first_draw(), (
            "the data module and the loader disagree on the position"
        )
