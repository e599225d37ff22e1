"""Hard concrete gates: the expected number of kept units, the budget by multipliers, and the state."""

import itertools
import math
from functools import partial

import pytest
import torch
from torch import nn

from pruning.toys import Toy
from tinyfusion_pl.pruning import DepthGates, DepthPruner, GateOptimizer
from tinyfusion_pl.pruning.hard_concrete import HardConcreteDistribution
from tinyfusion_pl.pruning.patterns import Group
from tinyfusion_pl.pruning.relaxations import Relaxation

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
LOGITS = torch.tensor([0.02, -0.03, 0.0, 0.01, -0.01, 0.05])


def distribution(num_kept=3, num_blocks=6, **kwargs):
    return HardConcreteDistribution(Group(0, num_kept, num_blocks), **kwargs)


def gates_of(model, pattern, **kwargs):
    return DepthGates(
        model, pattern, stacks="blocks", distribution=partial(HardConcreteDistribution, **kwargs)
    )


def test_the_expected_number_kept_is_that_of_the_draws():
    own = distribution()
    masks = own.sample(LOGITS, 1.0, own.noise(200_000, generator=torch.Generator().manual_seed(0)))
    expected = torch.sigmoid(100 * LOGITS)  # P(z > 1/2), with z stretched evenly to both sides
    torch.testing.assert_close(own.member_probabilities(LOGITS), expected)
    torch.testing.assert_close(masks.mean(0), expected, atol=4e-3, rtol=0)


@pytest.mark.parametrize("straight_through", ["all", "kept"])
def test_masks_are_exactly_zero_or_one_with_the_gradient_of_the_gate(straight_through):
    own = distribution(scaling=10.0, straight_through=straight_through)
    u = torch.rand(500, 6, generator=torch.Generator().manual_seed(1))
    weights, logits = torch.randn(500, 6), LOGITS.clone().requires_grad_()
    mask = own.sample(logits, 1.0, u.log() - (1 - u).log())
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    (grad,) = torch.autograd.grad((mask * weights).sum(), logits)
    other = LOGITS.clone().requires_grad_()
    s = 1 / (1 + torch.exp(-(u.log() - (1 - u).log() + 10 * other) / BETA))
    z = torch.minimum(torch.ones(()), torch.maximum(torch.zeros(()), s * (ZETA - GAMMA) + GAMMA))
    assert torch.equal(mask.detach(), (z > 0.5).float())
    weights = weights * mask.detach() if straight_through == "kept" else weights
    torch.testing.assert_close(
        grad, torch.autograd.grad((z * weights).sum(), other)[0], rtol=1e-4, atol=1e-5
    )


def test_the_decision_is_the_k_largest_and_ties_go_to_the_first():
    assert distribution().decide(LOGITS) == [0, 3, 5]
    assert distribution().decide(torch.zeros(6)) == [0, 1, 2]
    assert distribution(fixed={4}).decide(LOGITS) == [0, 4, 5]


def test_certainty_is_that_of_the_subsets_of_k():
    own, p = distribution(), distribution().member_probabilities(LOGITS.double())
    weights = torch.stack([torch.stack([p[i] if i in kept else 1 - p[i] for i in range(6)]).prod()
                           for kept in itertools.combinations(range(6), 3)])  # fmt: skip
    q = weights / weights.sum()
    found = own.certainty(LOGITS)
    assert (
        found.confidence == pytest.approx(q.max().item(), rel=1e-5) and found.probabilities is None
    )
    assert found.entropy == pytest.approx(-(q * q.log()).sum().item(), rel=1e-5)


def test_fixed_units_always_stay():
    own = distribution(fixed={1, 4})
    masks = own.sample(torch.full((6,), -1.0), 1.0, own.noise(50))
    assert masks[:, [1, 4]].eq(1).all() and masks[:, [0, 2, 3, 5]].eq(0).all()
    assert own.member_probabilities(torch.full((6,), -1.0)).sum().item() == pytest.approx(
        2, abs=1e-6
    )
    with pytest.raises(ValueError, match="0, 1 have to stay"):
        distribution(num_kept=1, fixed={0, 1})


def test_the_penalty_steps_with_the_logits_and_the_multipliers_ascend():
    gates = gates_of(Toy(depth=6), "1:3", multiplier_lr=0.5)
    steps, seen = GateOptimizer(clip=1e9), []
    steps.start(gates)
    steps._optimizer.step = lambda: seen.append([p.grad.clone() for p in gates.logits()])
    loss_grads = [torch.full((3,), 0.25), torch.full((3,), -0.5)]
    multipliers = torch.zeros(2)
    for _ in range(3):
        for p, grad in zip(gates.logits(), loss_grads):
            p.grad = grad.clone()
        steps.set_aside()
        assert steps.step()
        logits = torch.full((3,), 0.02, requires_grad=True)
        excess = torch.sigmoid(100 * logits).sum() - 1
        (penalty,) = torch.autograd.grad(
            multipliers[0] * excess + multipliers[1] * excess**2, logits
        )
        for found, grad in zip(seen[-1], loss_grads):
            torch.testing.assert_close(found, grad + penalty)
        multipliers = multipliers + 0.5 * torch.stack([excess, excess**2]).detach()
        for each in gates.stacks[0].multipliers:
            torch.testing.assert_close(each, multipliers)


class Adds(nn.Module):
    def __init__(self, place, size):
        super().__init__()
        self.step = nn.Parameter(torch.nn.functional.one_hot(torch.tensor(place), 6) * size)

    def forward(self, x):
        return x + self.step


class Additive(nn.Module):
    """Each block adds to a channel of its own: what its loss costs is known, the square of its size."""

    def __init__(self, sizes):
        super().__init__()
        self.blocks = nn.ModuleList(Adds(i, size) for i, size in enumerate(sizes))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_a_search_reaches_the_budget_and_keeps_what_costs_most():
    torch.manual_seed(0)
    model, x = Additive([0.3, 1.0, 0.1, 0.8, 1.2, 0.2]).train(), torch.randn(16, 6)
    target = model(x).detach()
    pruner = DepthPruner(
        keep=3,
        stacks="blocks",
        weight_update="frozen",
        relaxation=Relaxation("hard_concrete"),
        average_decay=0.9,
    )
    gates, steps = pruner.start(model), GateOptimizer()
    steps.start(gates)
    own = gates.stacks[0].distributions[0]
    assert own.member_probabilities(gates.logits()[0]).sum() > 5  # it begins dense
    for _ in range(120):
        gates.redraw()
        (model(x) - target).square().mean().backward()
        steps.set_aside()
        steps.step()
    assert own.member_probabilities(gates.logits()[0]).sum().item() == pytest.approx(3, abs=0.3)
    assert (
        gates.decide().kept_blocks == {"blocks": [1, 3, 4]}
        and len(pruner.freeze(model).blocks) == 3
    )


def test_groups_larger_than_can_be_enumerated():
    pruner = DepthPruner("20:40", weight_update="frozen", relaxation=Relaxation("hard_concrete"))
    stack = pruner.start(Toy(depth=40)).decide().stacks["blocks"]
    assert len(stack.kept_blocks) == 20 and stack.groups[0].entropy == pytest.approx(
        math.log(math.comb(40, 20))
    )


def test_a_foreign_model_with_a_block_that_has_to_stay():
    from foreign.zoo import ZOO

    model, _, _ = ZOO["sd3"].build()
    pruner = DepthPruner(keep=2, weight_update="frozen", relaxation=Relaxation("hard_concrete"))
    gates = pruner.start(model)
    (path, kept), last = (
        next(iter(gates.decide().kept_blocks.items())),
        gates.stacks[0].num_blocks - 1,
    )
    assert (
        last in kept
        and len(kept) == 2
        and gates.decide().stacks[path].block_probabilities[last] == 1
    )


def test_the_state_has_the_multipliers_and_refuses_another_relaxation():
    a, b = gates_of(Toy(depth=4), "1:2"), gates_of(Toy(depth=4), "1:2")
    with torch.no_grad():
        a.logits()[0].copy_(torch.tensor([0.3, 0.1]))
        a.stacks[0].multipliers[1].copy_(torch.tensor([0.5, 2.0]))
    b.load_gate_state(a.gate_state())
    assert torch.equal(b.logits()[0], a.logits()[0]) and b.stacks[0].multipliers[1].tolist() == [
        0.5,
        2.0,
    ]
    with pytest.raises(
        ValueError,
        match="HardConcreteDistribution.*CandidateDistribution.*resume with the relaxation",
    ):
        DepthGates(Toy(depth=4), "1:2", stacks="blocks").load_gate_state(a.gate_state())
    assert not [
        name
        for name in torch.nn.ModuleList([a]).state_dict()
        if "multipliers" in name or "fixed" in name
    ]


@pytest.mark.parametrize("options, message", [
    ({"name": "softmax"}, "relaxation is 'softmax'"), ({"straight_through": "none"}, "straight_through is 'none'"),
    ({"name": "hard_concrete", "multiplier_lr": 0.0}, "multiplier_lr is 0.0"), ({"multiplier_lr": float("nan")}, "multiplier_lr is nan"),
])  # fmt: skip
def test_relaxations_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Relaxation(**options)


@pytest.mark.parametrize("settings, message", [
    ((8.0, 0.1, None), "tau_start is 8.0"), ((4.0, 0.2, None), "tau_end is 0.2"), ((4.0, 0.1, 50), "anneal_steps is 50"),
])  # fmt: skip
def test_a_fixed_temperature_is_not_annealed(settings, message):
    assert Relaxation("hard_concrete").taus(4.0, 0.1, None) == (2 / 3, 2 / 3)
    assert Relaxation().taus(*settings) == settings[:2]
    with pytest.raises(ValueError, match=message):
        Relaxation("hard_concrete").taus(*settings)
