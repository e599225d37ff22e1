"""Runs of similar blocks: CKA against its textbook formula, the division against brute force over all of them."""

import itertools

import pytest
import torch

from foreign.zoo import ZOO
from pruning.toys import PairToy, Toy
from tinyfusion_pl.models import create_model
from tinyfusion_pl.selection import Calibration, Selection, Space, select_blocks
from tinyfusion_pl.selection.criteria.cka import CKA, linear_cka
from tinyfusion_pl.selection.runs import best_runs, run_starts

NUM = 6


def hsic(k, l):  # noqa: E741
    """The unbiased estimate as Song et al. (2012, equation 5) write it, of Gram matrices (n, n)."""
    n, k, l = len(k), k.clone().fill_diagonal_(0), l.clone().fill_diagonal_(0)  # noqa: E741
    one = torch.ones(n, dtype=k.dtype)
    cross = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (
        one @ k @ l @ one
    )
    return ((k @ l).trace() + cross) / (n * (n - 3))


def cka(x, y):
    k, l = (s.double() @ s.double().t() for s in (x, y))  # noqa: E741
    return (hsic(k, l) / (hsic(k, k) * hsic(l, l)).sqrt()).item()


def divisions(n, k):
    """Starts of every division of n members into k runs."""
    return [(0, *rest) for rest in itertools.combinations(range(1, n), k - 1)]


def total(values, starts):
    ends = [*starts[1:], len(values)]
    return sum(values[start][end - 1] for start, end in zip(starts, ends))


def toy(depth=8):
    torch.manual_seed(1)
    model = Toy(depth=depth).eval()
    with torch.no_grad():  # blocks of unequal effect, so that runs differ
        for i, block in enumerate(model.blocks):
            block.out.weight.mul_(3.0 if i % 3 == 0 else 0.3)
    return model


def draw(n):
    torch.manual_seed(0)
    return Calibration((torch.randn(n, 4, 6), torch.randn(n, 6)), num_samples=n)


def states_after(model):
    x, c = draw(NUM).args
    states = []
    with torch.no_grad():
        h = model.embed(x)
        for block in model.blocks:
            states.append((h.flatten(0, 1), (h := block(h, c)).flatten(0, 1)))
    return states


@pytest.mark.parametrize("num_channels", [3, 40])
def test_cka_is_the_textbook_formula(num_channels):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(12, 5, generator=g) + 3
    y = torch.cat([x[:, :2] * 2, torch.randn(12, num_channels, generator=g)], 1)
    found = linear_cka([x, y, torch.ones(12, 2)])
    assert found[0, 1].item() == pytest.approx(cka(x, y), rel=1e-9) and found[0, 0] == 1
    assert found[0, 2].abs() < 1e-6  # a state that tells samples apart by nothing


def test_cka_does_not_change_under_rotation_scale_and_shift():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(30, 5, generator=g)
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=g))[0]
    assert linear_cka([x, 3 * x @ rotation + 2])[0, 1].item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_the_best_runs_are_those_of_brute_force(n):
    g = torch.Generator().manual_seed(n)
    values = torch.rand(n, n, generator=g).tolist()
    for k in range(1, n + 1):
        for starts in [(), (n - 1,), tuple(range(0, n, 3))]:
            allowed = [d for d in divisions(n, k) if set(starts) <= {0, *d}]
            if allowed:
                assert best_runs(values, k, starts=starts) == list(
                    max(allowed, key=lambda d: total(values, d))
                )
            else:
                with pytest.raises(ValueError, match="cannot be divided"):
                    best_runs(values, k, starts=starts)


def test_of_equal_divisions_the_first_is_taken():
    assert best_runs([[1.0] * 6] * 6, 3) == [0, 1, 2]


@pytest.mark.parametrize("keep", [1, 3, 6])
def test_cka_keeps_the_first_of_each_run(keep):
    model = toy()
    states = states_after(model)
    values = [
        [1.0 if i == j else cka(states[i][1], states[j][1]) for j in range(8)] for i in range(8)
    ]
    best = max(divisions(8, keep), key=lambda d: total(values, d))
    found = Selection("cka", keep=keep, stacks="blocks", num_samples=NUM)(model, draw)
    stack = found.decision.stacks["blocks"]
    assert stack.kept_blocks == list(best)
    assert stack.scores == pytest.approx([1 - cka(x, y) for x, y in states], rel=1e-4, abs=1e-6)
    assert found.num_block_runs == 8 * NUM


def test_a_pattern_divides_each_group():
    model = toy()
    states = [y for _, y in states_after(model)]
    expected = []
    for start in (0, 4):
        values = [
            [1.0 if i == j else cka(states[start + i], states[start + j]) for j in range(4)]
            for i in range(4)
        ]
        expected += [start + i for i in max(divisions(4, 2), key=lambda d: total(values, d))]
    decision = select_blocks(
        model, draw, criterion="cka", pattern="2:4", stacks="blocks", num_samples=NUM
    )
    assert decision.kept_blocks == {"blocks": expected}


def test_streams_of_a_block_are_averaged():
    torch.manual_seed(2)
    model = PairToy(depth=5).eval()
    pair = (draw(NUM).args[0], draw(NUM).args[0].flip(1)[:, :2])
    states = []
    with torch.no_grad():
        for block in model.blocks:
            states.append(pair := block(pair))
    values = [
        [
            1.0
            if i == j
            else sum(cka(states[i][s].flatten(0, 1), states[j][s].flatten(0, 1)) for s in (0, 1))
            / 2
            for j in range(5)
        ]
        for i in range(5)
    ]
    best = max(divisions(5, 2), key=lambda d: total(values, d))
    found = select_blocks(model, draw, criterion="cka", keep=2, stacks="blocks", num_samples=NUM)
    assert found.kept_blocks == {"blocks": list(best)}


def test_of_mirrored_pairs_the_out_blocks_are_compared_before():
    """Units (0, 7), (1, 6), ...: of a run the in block stays that comes first, and the out block that comes last."""
    model = toy()
    states = states_after(model)
    values = [
        [
            1.0
            if i == j
            else (cka(states[i][1], states[j][1]) + cka(states[7 - i][0], states[7 - j][0])) / 2
            for j in range(4)
        ]
        for i in range(4)
    ]
    best = max(divisions(4, 2), key=lambda d: total(values, d))
    units = [(i, 7 - i) for i in range(4)]
    found = select_blocks(
        model, draw, criterion="cka", keep=2, stacks="blocks", units=units, num_samples=NUM
    )
    assert found.kept_blocks == {"blocks": sorted(b for i in best for b in units[i])}


def test_runs_stay_in_their_stack_and_begin_where_a_block_has_to_stay():
    model, _, _ = ZOO["flux"].build()
    space = Space(model, keep=3)
    firsts = [space.members(path).start for path in space.paths]
    assert run_starts(space, space.parts[0]) == firsts and len(firsts) == 2
    model, _, _ = ZOO["sd3"].build()
    space = Space(model, keep=2)
    assert run_starts(space, space.parts[0]) == [
        0,
        space.num_units - 1,
    ]  # its last block gives no text
    space = Space(Toy(depth=6), keep=2, stacks="blocks", units=[(0, 1), (3,), (4, 5)])
    assert run_starts(space, space.parts[0]) == [0, 1]  # block 2 always stays


@pytest.mark.parametrize("name", ["flux", "sd3", "auraflow"])
def test_foreign_stacks_are_divided_under_one_budget(name):
    model, make_inputs, _ = ZOO[name].build()
    torch.manual_seed(0)
    args, kwargs = make_inputs(2)
    decision = select_blocks(
        model.eval(),
        lambda n: Calibration(args, kwargs, num_samples=2),
        criterion="cka",
        keep=2,
        num_samples=2,
    )
    assert sum(len(g.kept) for s in decision.stacks.values() for g in s.groups) == 2


def test_mirrored_pairs_of_a_family_are_divided():
    torch.manual_seed(0)
    model = create_model(
        "uvit_s_2",
        input_size=8,
        in_channels=4,
        hidden_size=32,
        depth=8,
        num_heads=4,
        num_classes=10,
    ).eval()
    inputs = (torch.randn(4, 4, 8, 8), torch.randint(1000, (4,)), torch.randint(10, (4,)))
    decision = select_blocks(
        model, lambda n: Calibration(inputs, num_samples=4), criterion="cka", keep=2, num_samples=4
    )
    (stack,) = decision.stacks.values()
    assert sum(len(group.kept) for group in stack.groups) == 2 and stack.groups[0].kept[0] == 0


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"keep": 1, "units": [(0, 1), (3,), (4, 5)]},
            r"2 of them begin a run whatever their states are \(0, 1:.*pruning=greedy",
        ),
        ({"keep": 1, "units": [(0, 2), (4,)]}, "unequal numbers of blocks"),
    ],
)
def test_budgets_that_leave_no_runs_are_refused_first(options, message):
    def nothing(n):
        raise AssertionError("samples were drawn")

    with pytest.raises(ValueError, match=message):
        Selection("cka", stacks="blocks", **options).check(Toy(depth=6))
    with pytest.raises(ValueError, match=message):
        CKA()(type("Problem", (), {"space": Space(Toy(depth=6), stacks="blocks", **options)})())


def test_rows_are_bounded_and_drawn_by_the_seed():
    model = toy()
    options = dict(keep=3, stacks="blocks", num_samples=NUM, with_simple_rule=False)
    few = [
        Selection(CKA(num_rows=8), **options)(model, draw, seed=s).decision.stacks["blocks"].scores
        for s in (0, 0, 1)
    ]
    assert few[0] == few[1] != few[2]
    with pytest.raises(ValueError, match="num_rows is 3"):
        CKA(num_rows=3)
