"""A budget in place of a pattern: all units of a stack are one group."""

import itertools

import pytest

from pruning.toys import Toy
from tinyfusion_pl.pruning import DepthPruner
from tinyfusion_pl.pruning.budget import Budget
from tinyfusion_pl.pruning.patterns import MAX_CANDIDATES
from tinyfusion_pl.selection import Space


class TwoStacks(Toy):
    def __init__(self):
        super().__init__(depth=4)
        self.late = Toy(depth=6).blocks


@pytest.mark.parametrize("keep, count", [(3, 3), (0.5, 3), (0.34, 2), (5, 5)])
def test_keep_makes_one_group_of_all_units(keep, count):
    gates = DepthPruner(keep=keep, weight_update="frozen").start(Toy(depth=6))
    (group,), (distribution,) = gates.stacks[0].groups, gates.stacks[0].distributions
    assert (group.start, group.num_kept, group.num_blocks) == (0, count, 6)
    rows = [
        [float(i in kept) for i in range(6)] for kept in itertools.combinations(range(6), count)
    ]
    assert distribution.candidates.tolist() == rows
    assert (
        gates.decide().stacks["blocks"].pattern == f"{count}:6"
        and len(gates.decide().kept_blocks["blocks"]) == count
    )


def test_keep_counts_units_of_several_blocks():
    gates = DepthPruner(keep=1, weight_update="frozen", units=[(0, 5), (1, 4), (2, 3)]).start(
        Toy(depth=6)
    )
    assert gates.decide().kept_blocks == {"blocks": [0, 5]}


def test_each_stack_has_its_own_count_or_share():
    for keep, counts in (({"blocks": 1, "late": 4}, [1, 4]), (0.5, [2, 3])):
        gates = DepthPruner(keep=keep, stacks=["blocks", "late"], weight_update="frozen").start(
            TwoStacks()
        )
        assert [len(kept) for kept in gates.decide().kept_blocks.values()] == counts


@pytest.mark.parametrize("options, message", [
    ({}, "neither is given"), ({"pattern": "1:2", "keep": 3}, "both are given, keep=3 and pattern='1:2'"),
    ({"keep": "half"}, "a count of units"), ({"keep": True}, "a count of units"), ({"keep": float("nan")}, "a count of units"),
    ({"keep": {"blocks": "3"}}, "a count of units"),
    ({"pattern": "2:2"}, "keeps every block"),
])  # fmt: skip
def test_a_budget_that_says_nothing_is_refused_when_it_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        DepthPruner(**options)


@pytest.mark.parametrize("keep, message", [
    (6, "from 1 to 5"), (0, "from 1 to 5"), (2.5, "from 1 to 5"), (0.05, "from 1 to 5"), ({"other": 2}, "other"),
])  # fmt: skip
def test_a_budget_that_does_not_fit_the_model_is_refused(keep, message):
    with pytest.raises(ValueError, match=message):
        DepthPruner(keep=keep).check(Toy(depth=6))


def test_one_count_for_several_stacks_is_refused():
    with pytest.raises(
        ValueError,
        match=r"one count for several stacks \(blocks, late\).*keep=\{blocks: COUNT, late: COUNT\}",
    ):
        DepthPruner(keep=3, stacks=["blocks", "late"]).check(TwoStacks())


def test_too_many_candidates_are_refused_with_groups_that_fit():
    with pytest.raises(
        ValueError,
        match=f"184756 ways to keep 10 of the 20 units.*{MAX_CANDIDATES}.*'5:10.5:10'.*hard_concrete",
    ) as caught:
        DepthPruner(keep=10).check(Toy(depth=20))
    offered = str(caught.value).split("pattern='")[1].split("'")[0]
    DepthPruner(offered).check(Toy(depth=20))
    assert Budget(keep=10, enumerated=False).pattern(10, 20, path="blocks").num_kept(20) == 10


def test_criteria_enumerate_nothing_and_take_large_groups():
    assert Space(Toy(depth=20), pattern="10:20", stacks="blocks").parts[0].num_kept == 10
