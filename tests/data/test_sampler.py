"""The stream of samples: every epoch whole, the ranks' parts disjoint, any start."""

import pytest

from tinyfusion_pl.data import StreamLoader, StreamSampler
from tinyfusion_pl.data.sampler import epoch_order


def draws(num_draws, *, num_samples=10, start=0, **kwargs):
    return list(StreamSampler(num_samples, num_draws=num_draws, first_draw=lambda: start, **kwargs))


def test_each_epoch_holds_each_sample_once_in_a_fresh_order():
    stream = draws(30)
    epochs = [stream[:10], stream[10:20], stream[20:]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_order_is_a_function_of_seed_and_epoch():
    assert draws(20, seed=3) == draws(20, seed=3) != draws(20, seed=4)
    assert draws(20, seed=3)[10:] == epoch_order(10, 3, 1).tolist()


@pytest.mark.parametrize("start", [1, 9, 10, 25])
def test_stream_started_anywhere_is_the_rest_of_the_whole(start):
    assert draws(7, start=start) == draws(start + 7)[start:]


def test_ranks_interleave_to_the_stream_of_one_process():
    ranks = [draws(8, start=6, rank=rank, num_replicas=3) for rank in range(3)]
    assert [index for together in zip(*ranks, strict=True) for index in together] == draws(
        24, start=6
    )


def test_last_batch_of_an_epoch_goes_on_into_the_next():
    sampler = StreamSampler(10, num_draws=12)
    batches = [batch.tolist() for batch in StreamLoader(range(10), batch_size=4, sampler=sampler)]
    assert [len(batch) for batch in batches] == [4, 4, 4]
    assert sum(batches, []) == draws(12)


def test_batch_larger_than_the_data_takes_several_epochs():
    assert sorted(draws(25)) == sorted([*range(10), *range(10), *draws(25)[20:]])
