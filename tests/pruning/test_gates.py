import pytest
import torch

from pruning.toys import Toy
from tinyfusion_pl.pruning import (
    CandidateDistribution,
    DepthGates,
    Pattern,
    StackGates,
    linear_anneal,
)


def test_sampler_draws_candidates_with_their_probabilities():
    """Gumbel-max: the argmax of logits plus Gumbel noise is distributed as the softmax."""
    sampler = CandidateDistribution(Pattern.parse("2:4").groups(4)[0], scaling=10.0)
    logits = torch.tensor([0.1, 0.0, -0.1, 0.05, 0.0, 0.02])
    noise = sampler.noise(200_000, generator=torch.Generator().manual_seed(0))
    for tau in (4.0, 0.1):
        masks = sampler.sample(logits, tau, noise)
        chosen = (masks @ torch.tensor([8.0, 4, 2, 1])).long()
        codes = (sampler.candidates @ torch.tensor([8.0, 4, 2, 1])).long()
        frequency = torch.stack([(chosen == code).float().mean() for code in codes])
        torch.testing.assert_close(frequency, (10 * logits).softmax(0), atol=5e-3, rtol=0)
    torch.testing.assert_close(
        sampler.member_probabilities(logits), masks.mean(0), atol=5e-3, rtol=0
    )


def test_masks_are_exactly_zero_or_one_with_the_gradient_of_the_soft_choice():
    sampler = CandidateDistribution(Pattern.parse("1:3").groups(3)[0])
    logits = torch.tensor([0.01, 0.02, 0.0], requires_grad=True)
    noise, weights = sampler.noise(7, generator=torch.Generator().manual_seed(0)), torch.randn(7, 3)
    mask = sampler.sample(logits, 2.0, noise)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    (grad,) = torch.autograd.grad((mask * weights).sum(), logits)
    other = logits.detach().clone().requires_grad_()
    (soft,) = torch.autograd.grad(
        (((100 * other + noise) / 2.0).softmax(-1) @ sampler.candidates * weights).sum(), other
    )
    torch.testing.assert_close(grad, soft)


def test_the_decision_comes_from_the_average_of_the_logits_not_from_the_last():
    gates = StackGates("blocks", 4, "1:2", average_decay=0.9)
    with torch.no_grad():
        for _ in range(30):
            gates.logits[0].copy_(torch.tensor([0.0, 1.0]))
            gates.update_average()
        gates.logits[0].copy_(torch.tensor([1.5, 0.0]))
        gates.update_average()
    assert gates.kept_units() == [1, 2]
    expected = torch.tensor(0.02 * 0.9**31 + 0 * 0 + (1 - 0.9) * 1.5)
    torch.testing.assert_close(gates.averages[0][0], expected, rtol=1e-4, atol=1e-5)


def test_decision_states_probabilities_confidence_and_entropy():
    gates = StackGates("blocks", 4, "2:4", scaling=1.0)
    with torch.no_grad():
        gates.logits[0].copy_(torch.tensor([0.0, 0, 0, 0, 0, 2.0]))
    gates.update_average()
    decision = gates.decide()
    p = torch.tensor([1.0] * 5 + [torch.e**2]) / (5 + torch.e**2)
    assert decision.kept_blocks == [2, 3]
    assert decision.groups[0].confidence == pytest.approx(p[-1].item())
    assert decision.groups[0].entropy == pytest.approx(-(p * p.log()).sum().item(), rel=1e-5)
    assert sum(decision.block_probabilities) == pytest.approx(2)


def test_units_of_several_blocks_go_together_and_blocks_in_no_unit_stay():
    gates = StackGates("blocks", 5, "1:2", units=[(0, 4), (1, 3)])
    with torch.no_grad():
        gates.logits[0].copy_(torch.tensor([0.0, 1.0]))
    gates.update_average()
    decision = gates.decide()
    assert decision.kept_blocks == [1, 2, 3]
    assert (
        decision.block_probabilities[0]
        == decision.block_probabilities[4]
        < 0.5
        < decision.block_probabilities[1]
    )
    assert decision.block_probabilities[2] == 1.0


def test_units_share_one_mask_in_the_model():
    torch.manual_seed(0)
    model = Toy(depth=5)
    gates = DepthGates(model, "1:2", stacks="blocks", units=[(0, 4), (1, 3)])
    outputs = {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(
            lambda m, a, out, i=i: outputs.__setitem__(i, (out != a[0]).flatten(1).any(1))
        )
    model(torch.randn(32, 3, 6), torch.randn(32, 6))
    assert torch.equal(outputs[0], outputs[4]) and torch.equal(outputs[1], outputs[3])
    assert torch.equal(outputs[0], ~outputs[1]) and outputs[2].all()
    assert len(gates.logits()) == 1


def test_each_stack_has_its_own_pattern_and_key():
    model = torch.nn.Module()
    model.encoder, model.decoder = Toy(4), Toy(6)
    gates = DepthGates(model, {"encoder.blocks": "1:2", "decoder.blocks": "2:3"})
    assert {path: len(s.groups) for path, s in gates.decide().stacks.items()} == {
        "encoder.blocks": 2,
        "decoder.blocks": 2,
    }
    assert gates.decide().kept_blocks == {"encoder.blocks": [0, 2], "decoder.blocks": [0, 1, 3, 4]}


def test_layer_pairs_join_the_last_kept_of_each_group_to_the_last_of_the_group():
    gates = StackGates("blocks", 8, "2:4")
    with torch.no_grad():
        gates.logits[0][1] = 1.0  # keeps 0, 2
        gates.logits[1][5] = 1.0  # keeps 6, 7
    gates.update_average()
    decision = gates.decide()
    assert decision.kept_blocks == [0, 2, 6, 7]
    assert decision.layer_pairs() == [(1, 3), (3, 7)]


def test_gate_state_goes_round_and_refuses_another_pattern():
    a, b, c = (DepthGates(Toy(4), p) for p in ("1:2", "1:2", "2:4"))
    with torch.no_grad():
        a.logits()[0].copy_(torch.tensor([0.3, 0.1]))
    a.update_average()
    a.tau = 1.5
    b.load_gate_state(a.gate_state())
    assert (
        b.tau == 1.5
        and torch.equal(a.logits()[0], b.logits()[0])
        and torch.equal(a.stacks[0].averages[0], b.stacks[0].averages[0])
    )
    with pytest.raises(ValueError, match="'1:2'.*'2:4'"):
        c.load_gate_state(a.gate_state())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"scaling": 0}, "scaling is 0"),
        ({"tau": 0.0}, "tau is 0"),
        ({"average_decay": 1.0}, "average_decay is 1"),
        ({"units": [(0, 1), (1, 2)]}, "at most one unit"),
        ({"stacks": "layers"}, "Lists found: 'blocks'"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DepthGates(Toy(4), "1:2", **settings)


def test_anneal_goes_in_a_straight_line_and_stays_at_the_end():
    values = [linear_anneal(step, 5, start=4.0, end=0.0) for step in range(7)]
    assert values == [4.0, 3.0, 2.0, 1.0, 0.0, 0.0, 0.0]
    assert linear_anneal(0, 1, start=4.0, end=0.1) == 0.1
