"""Each criterion's scores and choice, held against a computation by hand."""

import math

import pytest
import torch

from pruning.toys import Toy
from small_dit_model import small_dit
from tinyfusion_pl.objectives import GaussianDiffusion
from tinyfusion_pl.pruning import Decision
from tinyfusion_pl.pruning.surgery import blocks_removed
from tinyfusion_pl.selection import CRITERIA, Calibration, Selection, Space, select_blocks
from tinyfusion_pl.selection.candidates import all_structures, sample_structures
from tinyfusion_pl.selection.criteria.global_search import (
    GlobalSearch,
    estimate_gradient,
    marginals,
)
from tinyfusion_pl.selection.criteria.rules import Index, Oracle
from tinyfusion_pl.selection.criteria.weights import Taylor

NUM = 16


def draw_fixed(model):
    """The same samples at each call, with a loss."""

    def draw(n):
        torch.manual_seed(0)
        x, c, goal = torch.randn(n, 4, 6), torch.randn(n, 6), torch.randn(n, 4, 6)
        return Calibration(
            (x, c),
            num_samples=n,
            context=goal,
            loss=lambda y, goal: (y - goal).square().flatten(1).mean(1),
        )

    return draw


def toy(depth=6):
    torch.manual_seed(1)
    return Toy(depth=depth).eval()


def choose(model, criterion, **options):
    options = {"keep": 3, "stacks": "blocks", "num_samples": NUM, "max_rows": 64, **options}
    found = Selection(criterion, **options)(model, draw_fixed(model))
    return found.decision.stacks["blocks"]


def hidden_states(model):
    calibration, states = draw_fixed(model)(NUM), []
    x, c = calibration.args
    with torch.no_grad():
        h = model.embed(x)
        for block in model.blocks:
            states.append((h, h := block(h, c)))
    return states


def test_shortgpt_is_one_minus_the_mean_cosine():
    model = toy()
    expected = [
        1 - (x * y).sum(-1).div(x.norm(dim=-1) * y.norm(dim=-1)).mean().item()
        for x, y in hidden_states(model)
    ]
    stack = choose(model, "shortgpt")
    assert stack.scores == pytest.approx(expected, rel=1e-4)
    assert stack.kept_blocks == sorted(sorted(range(6), key=lambda i: -expected[i])[:3])


def test_shortgpt_keeps_the_last_block_where_asked():
    from tinyfusion_pl.selection.criteria.block_influence import ShortGPT

    model = toy()
    with torch.no_grad():
        model.blocks[5].out.weight.zero_()  # a last block that changes nothing
    assert 5 not in choose(model, "shortgpt").kept_blocks
    assert 5 in choose(model, ShortGPT(keep_last=True)).kept_blocks


def test_flux_lite_is_the_mean_squared_change():
    model = toy()
    expected = [(y - x).square().mean().item() for x, y in hidden_states(model)]
    assert choose(model, "flux_lite").scores == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("measure", ["loss", "distance"])
def test_sensitivity_is_what_is_lost_when_one_block_goes(measure):
    from tinyfusion_pl.selection.criteria.sensitivity import Sensitivity

    model = toy()
    calibration = draw_fixed(model)(NUM).ask(model)
    index = torch.arange(NUM)

    def measured():
        with torch.no_grad():
            y = model(*calibration.args)
        return (
            (calibration.losses(y, index) if measure == "loss" else calibration.distances(y, index))
            .mean()
            .item()
        )

    whole, expected = measured(), []
    for i in range(6):
        with blocks_removed(model, {"blocks": [j for j in range(6) if j != i]}):
            expected.append(measured() - whole)
    assert choose(model, Sensitivity(measure=measure)).scores == pytest.approx(
        expected, rel=1e-3, abs=1e-6
    )


def test_taylor_is_weight_times_gradient_and_leaves_none_behind():
    model = toy()
    calibration = draw_fixed(model)(NUM)
    calibration.losses(model(*calibration.args), torch.arange(NUM)).mean().backward()
    expected = [
        sum((p * p.grad).abs().sum().item() for p in block.parameters()) for block in model.blocks
    ]
    model.zero_grad()
    assert choose(model, Taylor(batch_size=5)).scores == pytest.approx(expected, rel=1e-4)
    assert all(p.grad is None for p in model.parameters())


def test_magnitude_is_the_sum_of_the_weights():
    model = toy()
    expected = [sum(p.abs().sum().item() for p in block.parameters()) for block in model.blocks]
    assert choose(model, "magnitude").scores == pytest.approx(expected, rel=1e-5)


def losses_of_all(model, keep=3):
    space, calibration = Space(model, keep=keep, stacks="blocks"), draw_fixed(model)(NUM)
    losses = []
    for structure in all_structures(space):
        with blocks_removed(model, space.kept_blocks(structure)), torch.no_grad():
            losses.append(
                (
                    calibration.losses(model(*calibration.args), torch.arange(NUM)).mean().item(),
                    space.kept_blocks(structure),
                )
            )
    return sorted(losses, key=lambda each: each[0])


def test_the_smallest_median_and_largest_loss_of_all_structures():
    model = toy()
    ranked = [kept["blocks"] for _, kept in losses_of_all(model)]
    assert choose(model, "min_loss").kept_blocks == ranked[0]
    assert choose(model, "median_loss").kept_blocks == ranked[(len(ranked) - 1) // 2]
    assert choose(model, "max_loss").kept_blocks == ranked[-1]


def test_greedy_removes_the_least_missed_block_each_time():
    model = toy()
    calibration, kept = draw_fixed(model)(NUM).ask(model), list(range(6))

    def distance(blocks):
        with blocks_removed(model, {"blocks": blocks}), torch.no_grad():
            return calibration.distances(model(*calibration.args), torch.arange(NUM)).mean().item()

    while len(kept) > 3:
        kept.remove(min(kept, key=lambda i: distance([j for j in kept if j != i])))
    assert choose(model, "greedy").kept_blocks == kept


@pytest.mark.parametrize(
    "n, expected",
    [
        (28, [0, 2, 4, 6, 8, 10, 12, 15, 17, 19, 21, 23, 25, 27]),
        (14, [0, 2, 4, 6, 9, 11, 13]),
        (12, [0, 2, 4, 7, 9, 11]),
    ],
)
def test_the_oracle_keeps_the_first_of_early_pairs_and_the_last_of_late_ones(n, expected):
    assert Oracle().places(n, n // 2) == expected


@pytest.mark.parametrize("n, k, message", [(12, 4, "keep=6"), (7, 3, "make no pairs")])
def test_the_oracle_is_for_half_the_depth_only(n, k, message):
    with pytest.raises(ValueError, match=message):
        Oracle().places(n, k)


def test_rules_by_place():
    model = toy()
    assert choose(model, "first").kept_blocks == [0, 1, 2]
    assert choose(model, "uniform").kept_blocks == [0, 2, 4]
    assert choose(model, Index([5, 1, 3])).kept_blocks == [1, 3, 5]
    assert len(choose(model, "random").kept_blocks) == 3
    assert choose(model, "first", keep=None, pattern="1:2").kept_blocks == [0, 2, 4]


@pytest.mark.parametrize(
    "kept, message", [([0, 1], "keeps 2 of the units"), ([0, 1, 9], r"names the units \[9\]")]
)
def test_an_index_that_misses_the_budget_is_refused(kept, message):
    with pytest.raises(ValueError, match=message):
        choose(toy(), Index(kept))


# -- the learned choice -------------------------------------------------------
def test_the_gradient_estimate_is_unbiased():
    """Its mean over many steps, against the exact gradient of the expected loss by enumeration, within its error bars."""
    space = Space(toy(), keep=3, stacks="blocks")
    theta = torch.linspace(-1, 1, 6, dtype=torch.float64).requires_grad_()
    structures = all_structures(space)
    torch.manual_seed(0)
    table = torch.randn(2, len(structures), dtype=torch.float64)  # losses of two samples
    p = (structures.double() @ theta).softmax(0)
    (exact,) = torch.autograd.grad((table.mean(0) * p).sum(), theta)
    place = {tuple(s.tolist()): i for i, s in enumerate(structures)}
    theta, estimates = theta.detach(), []
    mu = marginals(space, theta)
    for _ in range(3000):
        drawn = sample_structures(space, theta, 2 * 4)
        losses = torch.stack(
            [table[row // 4, place[tuple(s.tolist())]] for row, s in enumerate(drawn)]
        ).view(2, 4)
        estimates.append(estimate_gradient(losses, drawn, mu))
    estimates = torch.stack(estimates)
    error = estimates.std(0) / math.sqrt(len(estimates))
    assert ((estimates.mean(0) - exact).abs() < 4 * error).all() and (
        error < 0.1 * exact.abs().max()
    ).all()


def test_the_search_finds_the_blocks_that_matter_and_states_how_sure_it_is():
    model = toy()
    with torch.no_grad():
        for i in (1, 2, 4):
            model.blocks[i].out.weight.mul_(0.02)
            model.blocks[i].out.bias.mul_(0.02)
    found = Selection(GlobalSearch(num_steps=60), keep=3, stacks="blocks", num_samples=NUM)(
        model, draw_fixed(model)
    )
    stack = found.decision.stacks["blocks"]
    assert stack.kept_blocks == [0, 3, 5] and stack.criterion == "global"
    assert (
        sum(stack.block_probabilities) == pytest.approx(3)
        and min(stack.block_probabilities[i] for i in (0, 3, 5)) > 0.8
    )
    (group,) = stack.groups
    assert 0 < group.confidence <= 1 and group.entropy < math.log(20)
    assert len(found.history) == 60 and found.num_block_runs > 60 * 32 * 6


def test_the_same_seed_gives_the_same_choice_and_touches_no_generator():
    model = small_dit((0, 1, 2, 3))
    objective = GaussianDiffusion()

    def draw(n):
        return Calibration.of(objective, torch.randn(n, 4, 8, 8), torch.randint(10, (n,)))

    torch.manual_seed(5)
    before = torch.get_rng_state()
    options = dict(
        keep=2,
        candidates=3,
        trial_steps=[1, 2],
        num_drawn=20,
        num_samples=8,
        max_rows=64,
        trials={"batch_size": 4, "num_scored": 8},
    )
    first = Selection(GlobalSearch(num_steps=5), **options)(model, draw, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    again = Selection(GlobalSearch(num_steps=5), **options)(model, draw, seed=3)
    assert first.decision == again.decision and first.num_block_runs == again.num_block_runs
    assert [len(each) for each in first.rounds] == [3, 2] and "trials" in first.decision.stacks[
        "blocks"
    ].criterion


def test_trials_prefer_what_recovers_over_what_is_near():
    """Of two structures the nearer one has a frozen way: the other recovers better."""
    model = toy(4)
    found = Selection(
        "random",
        keep=2,
        stacks="blocks",
        candidates=4,
        num_drawn=0,
        trial_steps=[5, 5],
        num_samples=NUM,
        max_rows=64,
        trials={"batch_size": NUM, "num_scored": NUM, "lr": 1e-2},
    )(model, draw_fixed(model))
    last = found.rounds[-1]
    best = min(last, key=lambda each: each["distance"])
    kept = [i for i, keep in enumerate(best["structure"].tolist()) if keep]
    assert found.decision.kept_blocks == {"blocks": kept}
    assert found.rounds[0][0]["distance"] > min(
        each["distance"] for each in last
    )  # they have learned


# -- the door -----------------------------------------------------------------
@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_gives_a_decision_that_cuts(name):
    model = toy()
    decision = select_blocks(
        model,
        draw_fixed(model),
        criterion=name,
        keep=3,
        stacks="blocks",
        num_samples=NUM,
        max_rows=64,
        **({"candidates": 0}),
    )
    stack = decision.stacks["blocks"]
    assert len(stack.kept_blocks) == 3 and stack.pattern == "3:6" and stack.criterion == name
    assert Decision.from_dict(decision.as_dict()) == decision
    assert stack.layer_pairs() == [(0, 1), (1, 3), (2, 5)]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"criterion": "best"}, "criterion is 'best'; give one of global"),
        ({"trial_steps": [3]}, "give 2 or more to try"),
        ({"candidates": -1}, "candidates is -1"),
        ({"num_samples": 1}, "num_samples is 1"),
        ({"max_rows": 8}, "max_rows is 8"),
        ({"candidates": 4, "trial_steps": [0]}, r"steps is \[0\]"),
        ({"keep": None}, "neither is given"),
        ({"candidates": 4, "trial_steps": [1], "trials": {"lr": 0}}, "lr is 0"),
    ],
)
def test_mistakes_are_refused_when_it_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        Selection(**{"keep": 3, **options})


def test_a_choice_that_needs_a_loss_says_so():
    model = toy()
    draw = lambda n: Calibration((torch.randn(n, 4, 6), torch.randn(n, 6)), num_samples=n)  # noqa: E731
    with pytest.raises(ValueError, match="needs a loss"):
        select_blocks(model, draw, criterion="taylor", keep=3, stacks="blocks")
