"""Stacks of several joined lists, whose blocks go together in units that the model states."""

import copy

import pytest
import torch
from torch import nn

from pruning.toys import Block
from tinyfusion_pl.distill import HiddenStates
from tinyfusion_pl.pruning import DepthGates, find_stacks, get_stack, remove_blocks, remove_gates

PATH = "down+up"


class Skipping(nn.Module):
    """Blocks of `up` add what the mirrored block of `down` put out."""

    STACKS = {PATH: "depth"}

    def __init__(self, depth=8, dim=6):
        super().__init__()
        self.config = {"depth": depth}
        self.down, self.up = (
            nn.ModuleList(Block(dim) for _ in range(depth // 2)) for _ in range(2)
        )

    def units(self, stack):
        n = len(self.down) + len(self.up)
        return tuple((i, n - 1 - i) for i in range(n // 2))

    def forward(self, x, c=None):
        skips = []
        for block in self.down:
            x = block(x, c)
            skips.append(x)
        for block in self.up:
            x = block(x, c, skips.pop())
        return x


def inside(model):
    holder = nn.Module()
    holder.denoiser = model
    return holder


def batch(n=5):
    return torch.randn(n, 3, 6), torch.randn(n, 6)


def test_a_joined_stack_is_a_view_on_its_lists():
    model = Skipping(6)
    blocks, stack = [*model.down, *model.up], get_stack(inside(model), f"denoiser.{PATH}")
    assert (
        len(stack) == 6 and list(stack) == blocks and [stack[i] for i in range(-6, 6)] == 2 * blocks
    )
    with pytest.raises(IndexError):
        stack[6]
    del stack[4]
    del stack[1]
    assert [*model.down, *model.up] == [blocks[i] for i in (0, 2, 3, 5)]
    assert set(dict(model.up.named_children())) == {"0", "1"}  # names close up


def test_a_missing_list_of_a_joined_stack_is_named():
    with pytest.raises(ValueError, match="nothing at 'denoiser.across'.*'denoiser.down'"):
        get_stack(inside(Skipping()), "denoiser.down+across")


def test_the_stated_stack_is_found_alone_wherever_the_model_is_held():
    assert list(find_stacks(Skipping())) == [PATH]
    assert list(find_stacks(inside(Skipping()))) == [f"denoiser.{PATH}"]


def test_gates_take_the_units_that_the_model_states_unless_told_otherwise():
    assert DepthGates(inside(Skipping()), "1:2").stacks[0].units == ((0, 7), (1, 6), (2, 5), (3, 4))
    assert DepthGates(Skipping(), "1:2", units=[(1, 6), (2, 5)]).stacks[0].units == ((1, 6), (2, 5))


def test_both_blocks_of_a_pair_draw_one_mask():
    model = Skipping()
    DepthGates(model, "1:2")
    ran = {}
    for i, block in enumerate(get_stack(model, PATH)):
        block.register_forward_hook(
            lambda m, args, out, i=i: ran.__setitem__(i, (out != args[0]).flatten(1).any(1))
        )
    model(*batch(32))
    assert all(torch.equal(ran[i], ran[7 - i]) for i in range(4))
    assert torch.equal(ran[0], ~ran[1]) and torch.equal(ran[2], ~ran[3])
    assert 0 < ran[0].sum() < 32


def test_gradients_are_those_of_the_formula_written_out_with_its_skips():
    model = Skipping(4)
    plain = copy.deepcopy(model)
    gates = DepthGates(model, "1:2", tau=1.0)
    (x, c), logits = batch(6), gates.logits()[0]
    noise = torch.randn(6, 2)
    gates.fix_noise({PATH: [noise]})
    model(x, c).square().sum().backward()
    other = logits.detach().clone().requires_grad_()
    soft = ((100 * other + noise) / 1.0).softmax(-1)
    hard = torch.nn.functional.one_hot(soft.argmax(-1), 2)
    mask = (hard - soft.detach() + soft) @ torch.tensor([[1.0, 0], [0, 1]])  # (N, pairs)
    h, skips = x, []
    for i, block in enumerate(plain.down):
        m = mask[:, i, None, None]
        h = m * block(h, c) + (1 - m) * h
        skips.append(h)
    for i, block in enumerate(plain.up):
        m = mask[:, 1 - i, None, None]
        h = m * block(h, c, skips.pop()) + (1 - m) * h
    h.square().sum().backward()
    torch.testing.assert_close(logits.grad, other.grad, rtol=1e-4, atol=1e-5)
    for (name, p), q in zip(model.named_parameters(), plain.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_the_pruned_model_computes_what_the_gated_one_decided():
    model, (x, c) = Skipping(), batch()
    gates = DepthGates(model, "2:4")
    with torch.no_grad():
        gates.logits()[0].copy_(torch.randn(6))
    gates.update_average()
    decision = gates.decide()
    expected = model.eval()(x, c)
    pruned = copy.deepcopy(model)
    remove_gates(pruned)
    remove_blocks(pruned, decision.kept_blocks)
    assert len(pruned.down) == len(pruned.up) == 2 and pruned.config == {"depth": 4}
    torch.testing.assert_close(pruned(x, c), expected, rtol=0, atol=0)


def test_layer_pairs_of_mirrored_pairs_join_both_halves():
    gates = DepthGates(Skipping(), "1:2")
    with torch.no_grad():
        gates.logits()[0][1] = 1.0  # of the pairs (0, 7), (1, 6) the second
        gates.logits()[1][0] = 1.0  # of the pairs (2, 5), (3, 4) the first
    gates.stacks[0].average_decay = 0.0
    gates.update_average()
    decision = gates.decide().stacks[PATH]
    assert decision.kept_blocks == [1, 2, 5, 6]
    assert decision.layer_pairs() == [(0, 1), (3, 7), (1, 3), (2, 5)]


def test_hidden_states_are_taken_by_the_place_in_the_joined_stack():
    model, (x, c) = Skipping(4), batch()
    with HiddenStates(model, PATH, [1, 3]) as hidden:
        output = model(x, c)
    first = model.down[0](x, c)
    assert torch.equal(hidden[1], model.down[1](first, c)) and torch.equal(hidden[3], output)


@pytest.mark.parametrize("kept", [[0, 1], [0, 7, 6], [3, 4, 5]])
def test_half_a_pair_cannot_be_removed(kept):
    with pytest.raises(ValueError, match="these only go together"):
        remove_blocks(Skipping(), {PATH: sorted(kept)})


@pytest.mark.parametrize("path", ["down", "up", "denoiser.up"])
def test_a_part_of_a_joined_stack_is_refused_and_the_whole_named(path):
    model = inside(Skipping()) if "." in path else Skipping()
    with pytest.raises(
        ValueError, match=rf"'{path}' is a part of .* Name the whole stack: '(denoiser\.)?down\+up'"
    ):
        DepthGates(model, "1:2", stacks=path)
    with pytest.raises(ValueError, match="Name the whole stack"):
        remove_blocks(model, {path: [0]})
