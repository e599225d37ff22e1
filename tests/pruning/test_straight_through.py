"""Kept-only straight-through: a sample's gradient flows into the units that it kept, and into no other."""

from functools import partial

import pytest
import torch

from pruning.toys import Toy, plain_formula
from tinyfusion_pl.pruning import CandidateDistribution, DepthGates, Pattern

KEPT = partial(CandidateDistribution, scaling=10.0, straight_through="kept")


def test_the_gradient_is_that_of_the_kept_members():
    own = KEPT(Pattern.parse("2:4").groups(4)[0])
    logits = torch.tensor([0.1, 0.0, -0.1, 0.05, 0.0, 0.02], requires_grad=True)
    noise, weights = own.noise(50, generator=torch.Generator().manual_seed(0)), torch.randn(50, 4)
    mask = own.sample(logits, 2.0, noise)
    assert set(mask.unique().tolist()) == {0.0, 1.0} and mask.sum(1).eq(2).all()
    (grad,) = torch.autograd.grad((mask * weights).sum(), logits)
    other = logits.detach().clone().requires_grad_()
    soft = ((10 * other + noise) / 2.0).softmax(-1) @ own.candidates
    (expected,) = torch.autograd.grad((soft * weights * mask.detach()).sum(), other)
    torch.testing.assert_close(grad, expected)
    published = CandidateDistribution(Pattern.parse("2:4").groups(4)[0], scaling=10.0)
    assert torch.equal(published.sample(logits, 2.0, noise), mask)  # the same masks
    (all_members,) = torch.autograd.grad(
        (published.sample(logits, 2.0, noise) * weights).sum(), logits
    )
    assert not torch.allclose(all_members, grad)


@pytest.mark.parametrize("gather", [True, False])
def test_in_a_model_dropped_units_give_their_sample_no_gradient(gather):
    torch.manual_seed(0)
    model = Toy(depth=4).train()
    gates = DepthGates(model, "1:2", stacks="blocks", distribution=KEPT, tau=2.0, gather=gather)
    x, c = torch.randn(8, 3, 6), torch.randn(8, 6)
    noise = [
        d.noise(8, generator=torch.Generator().manual_seed(i))
        for i, d in enumerate(gates.stacks[0].distributions)
    ]
    gates.fix_noise({"blocks": noise})
    model(x, c).square().mean().backward()
    # By hand: the gradient of each mask entry of the plain formula, those of dropped blocks taken
    # out, into the soft choice.
    own = [p.detach().clone().requires_grad_() for p in gates.logits()]
    soft = [
        ((10 * p + n) / 2.0).softmax(-1) for p, n in zip(own, noise)
    ]  # the candidates are (1, 0) and (0, 1)
    masks = torch.cat(
        [torch.nn.functional.one_hot(s.argmax(1), 2).float() for s in soft], 1
    ).requires_grad_()
    with gates.bypass():
        (of_masks,) = torch.autograd.grad(plain_formula(model, x, c, masks).square().mean(), masks)
    (torch.cat(soft, 1) * of_masks * masks.detach()).sum().backward()
    for found, expected in zip(gates.logits(), own):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-7)


def test_another_word_is_refused():
    with pytest.raises(ValueError, match="straight_through is 'half'"):
        CandidateDistribution(Pattern.parse("1:2").groups(2)[0], straight_through="half")
