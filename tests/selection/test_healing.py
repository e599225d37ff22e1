"""Greedy removal on a copy that heals, held against the same by hand."""

import copy

import pytest
import torch
from torch import nn

from pruning.toys import Block, Toy
from tinyfusion_pl.pruning.surgery import blocks_removed
from tinyfusion_pl.selection import Calibration, Selection
from tinyfusion_pl.selection.criteria.greedy import Greedy

NUM, DEPTH, KEEP = 16, 6, 3
HEALING = dict(healing_steps=4, healing_batch_size=NUM, healing_lr=1e-2)


def toy(seed=1):
    torch.manual_seed(seed)
    return Toy(depth=DEPTH).eval()


def draw(n):
    """The same samples at each call."""
    torch.manual_seed(0)
    return Calibration((torch.randn(n, 4, 6), torch.randn(n, 6)), num_samples=n)


def choose(model, *, seed=0, samples=draw, **options):
    selection = Selection(
        Greedy(**options), keep=KEEP, stacks="blocks", num_samples=NUM, with_simple_rule=False
    )
    return selection(model, samples, seed=seed)


def by_hand(model, *, steps, lr):
    """Blocks in the order in which they go."""
    x, c = draw(NUM).args
    with torch.no_grad():
        target = model(x, c)
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)

    def loss(blocks):
        with blocks_removed(model, {"blocks": blocks}):
            return (model(x, c) - target).square().mean()

    kept, gone = list(range(DEPTH)), []
    while len(kept) > KEEP:
        with torch.no_grad():
            gone.append(min(kept, key=lambda i: loss([j for j in kept if j != i]).item()))
        kept.remove(gone[-1])
        for _ in range(steps if len(kept) > KEEP else 0):
            optimizer.zero_grad()
            loss(kept).backward()
            optimizer.step()
    return gone


def order(found):
    scores = found.decision.stacks["blocks"].scores
    return sorted((i for i in range(DEPTH) if scores[i] < DEPTH - KEEP), key=lambda i: scores[i])


@pytest.mark.parametrize("seed", [1, 2, 4])
def test_removals_are_scored_on_the_healed_copy(seed):
    model = toy(seed)
    plain, healed = by_hand(model, steps=0, lr=1e-2), by_hand(model, steps=4, lr=1e-2)
    assert plain != healed  # healing changes what goes
    assert order(choose(model)) == plain and order(choose(model, **HEALING)) == healed


def prefixes(order_gone, num_rounds):
    """Block runs of the scoring passes: each distinct prefix that ends in a kept block runs once for all structures of a round."""
    kept, runs = list(range(DEPTH)), 0
    for unit in order_gone[:num_rounds]:
        rows = [[j in kept and j != i for j in range(DEPTH)] for i in kept]
        runs += len({tuple(row[: i + 1]) for row in rows for i in range(DEPTH) if row[i]})
        kept.remove(unit)
    return runs


def test_healing_is_counted_in_block_runs():
    found = choose(toy(), **{**HEALING, "healing_batch_size": 5})
    scoring = prefixes(order(found), 3) * NUM
    heals = sum(
        4 * 5 * (DEPTH + 3 * left) for left in (5, 4)
    )  # the dense model's answers, and a step as three forward passes
    assert found.num_block_runs == scoring + heals


def test_healing_leaves_the_model_as_it_was():
    model = toy().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    choose(model, **HEALING)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any("forward" in vars(m) for m in model.modules()) and torch.equal(
        state, torch.get_rng_state()
    )


class DropoutBlock(Block):
    def forward(self, x, c=None):
        return nn.functional.dropout(super().forward(x, c), 0.2, self.training)


def test_healing_is_a_function_of_the_seed():
    def samples(n):
        return Calibration((torch.randn(n, 4, 6), torch.randn(n, 6)), num_samples=n)

    torch.manual_seed(1)
    model = Toy(depth=DEPTH).eval()
    model.blocks = nn.ModuleList(DropoutBlock() for _ in range(DEPTH))
    found = []
    for global_seed in (5, 6):
        torch.manual_seed(global_seed)
        found.append(choose(model, seed=3, samples=samples, **HEALING))
    assert (
        found[0].decision == found[1].decision
        and found[0].num_block_runs == found[1].num_block_runs
    )


def test_a_loss_heals_by_data_too():
    def samples(n):
        torch.manual_seed(0)
        x, c, goal = torch.randn(n, 4, 6), torch.randn(n, 6), torch.randn(n, 4, 6)
        return Calibration(
            (x, c),
            num_samples=n,
            context=goal,
            loss=lambda y, goal: (y - goal).square().flatten(1).mean(1),
        )

    found = choose(toy(), samples=samples, measure="loss", **HEALING)
    assert len(found.decision.kept_blocks["blocks"]) == KEEP


@pytest.mark.parametrize(
    "options, message",
    [
        ({"healing_steps": -1}, "healing_steps is -1"),
        ({"healing_batch_size": 0}, "healing_batch_size is 0"),
        ({"healing_lr": 0.0}, "healing_lr is 0.0"),
    ],
)
def test_healing_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Greedy(**options)
