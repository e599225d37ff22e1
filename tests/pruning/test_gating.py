import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pruning.toys import AttnToy, PairToy, Toy, plain_formula
from tinyfusion_pl.pruning import DepthGates, remove_gates

N, T, D = 5, 3, 6


def batch(seed=0, n=N):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, T, D, generator=g), torch.randn(n, D, generator=g)


def gated_toy(mode="positional", pattern="1:2", depth=4, init=None, **kwargs):
    torch.manual_seed(0)
    model = Toy(depth, mode=mode)
    gates = DepthGates(model, pattern, **kwargs)
    if init is not None:
        with torch.no_grad():
            for logits, value in zip(gates.logits(), init):
                logits.copy_(torch.tensor(value))
    return model, gates


def noise_for(gates, n=N, seed=1):
    g = torch.Generator().manual_seed(seed)
    return {
        s.path: [
            -torch.empty(n, m.num_logits).exponential_(generator=g).log() for m in s.distributions
        ]
        for s in gates.stacks
    }


def reference_masks(gates, noise):
    """Straight-through masks by torch's own arithmetic, independent of the sampler."""
    columns = []
    for sampler, logits, g in zip(gates.stacks[0].distributions, gates.logits(), noise["blocks"]):
        soft = ((sampler.scaling * logits + g) / gates.tau).softmax(-1)
        hard = nn.functional.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft)
        columns.append((hard - soft.detach() + soft) @ sampler.candidates)
    return torch.cat(columns, 1)


def gradients(model, gates, loss):
    named = {
        **dict(model.named_parameters()),
        **{f"gate{i}": p for i, p in enumerate(gates.logits())},
    }
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return dict(zip(named, grads))


def assert_same_gradients(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert (ours[name] is None) == (theirs[name] is None), name
        if ours[name] is not None:
            torch.testing.assert_close(
                ours[name],
                theirs[name],
                rtol=1e-4,
                atol=1e-6,
                msg=lambda m, name=name: f"{name}: {m}",
            )


def plain(model, gates, noise, x, c):
    bare = copy.deepcopy(model)
    remove_gates(bare)
    masks = reference_masks(gates, noise)
    named = {
        **dict(bare.named_parameters()),
        **{f"gate{i}": p for i, p in enumerate(gates.logits())},
    }
    loss = plain_formula(bare, x, c, masks).float().square().mean()
    return loss, dict(
        zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True))
    )


@pytest.mark.parametrize("mode", ["positional", "keyword", "checkpoint"])
@pytest.mark.parametrize("pattern", ["1:2", "2:4", "1:4", "4:4", "1:1+1:2+1:1"])
def test_loss_and_every_gradient_equal_the_plain_formula(mode, pattern):
    model, gates = gated_toy(mode, pattern)
    x, c = batch()
    noise = noise_for(gates)
    gates.fix_noise(noise)
    loss = model(x, c).square().mean()
    expected, theirs = plain(model, gates, noise, x, c)
    torch.testing.assert_close(loss, expected)
    assert_same_gradients(gradients(model, gates, loss), theirs)


@pytest.mark.parametrize("init", [([9.0, 0.0], [9.0, 0.0]), ([0.0, 9.0], [9.0, 0.0])])
def test_saturated_logits_give_zero_gradients_not_none_to_a_block_that_all_samples_drop(init):
    model, gates = gated_toy(init=init)
    x, c = batch()
    loss = model(x, c).square().mean()
    grads = gradients(model, gates, loss)
    dropped = 1 if init[0][0] else 0
    for name, grad in grads.items():
        if name.startswith(f"blocks.{dropped}."):
            assert grad is not None and not grad.any(), name
        elif not name.startswith("gate"):
            assert (grad is not None and grad.any()) or name.startswith("blocks."), name


def test_twenty_adamw_steps_equal_twenty_of_the_plain_formula():
    init = ([0.05, 0.0], [0.0, 0.03])
    model, gates = gated_toy(init=init)
    other, other_gates = gated_toy(init=init)
    remove_gates(other)
    ours = torch.optim.AdamW([*model.parameters(), *gates.logits()], lr=1e-2, weight_decay=0.1)
    theirs = torch.optim.AdamW(
        [*other.parameters(), *other_gates.logits()], lr=1e-2, weight_decay=0.1
    )
    seen_all_dropped = False
    for step in range(20):
        x, c = batch(step)
        noise = noise_for(gates, seed=step)
        gates.fix_noise(noise)
        model(x, c).square().mean().backward()
        masks = reference_masks(other_gates, noise)
        seen_all_dropped |= bool((masks.detach().round().sum(0) == 0).any())
        plain_formula(other, x, c, masks).square().mean().backward()
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    assert seen_all_dropped, "the case this test is for did not occur"
    for (name, a), b in zip(
        [*model.named_parameters(), *gates.named_parameters()],
        [*other.parameters(), *other_gates.parameters()],
    ):
        torch.testing.assert_close(
            a, b, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("mode", ["checkpoint", "checkpoint-reentrant"])
def test_two_forwards_of_a_batch_share_masks_when_recomputed(mode):
    model, gates = gated_toy(mode)
    model.embed = nn.Identity()  # so that the first block is handed the very same tensor
    x, c = batch()
    x.requires_grad_()
    noise = noise_for(gates)
    gates.fix_noise(noise)
    (model(x, c).square().mean() + model(x, c).square().mean()).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()} | {
        f"gate{i}": p.grad.clone() for i, p in enumerate(gates.logits())
    }
    once = plain(model, gates, noise, x, c)[1]
    assert_same_gradients(grads, {n: 2 * g for n, g in once.items()})


def test_a_redraw_before_a_recomputation_is_refused():
    model, gates = gated_toy("checkpoint", pattern="2:4")
    loss = model(*batch(n=2)).square().mean()
    gates.redraw()
    with pytest.raises(RuntimeError, match="drawn anew|different metadata|different number"):
        loss.backward()


def test_logits_that_change_without_a_redraw_are_refused():
    model, gates = gated_toy()
    model(*batch())
    with torch.no_grad():
        gates.logits()[0].add_(1)
    with pytest.raises(RuntimeError, match="gates.redraw()"):
        model(*batch())
    gates.redraw()
    model(*batch())


def test_another_batch_size_in_a_step_has_masks_of_its_own():
    model, gates = gated_toy(depth=8)
    first, other = (gates.masks.column(gates.stacks[0], 0, n) for n in (64, 32))
    assert len(first) == 64 and len(other) == 32 and not torch.equal(first[:32], other)
    assert torch.equal(first, gates.masks.column(gates.stacks[0], 0, 64))


def test_checkpointing_of_the_whole_model_recomputes_with_the_same_mask():
    torch.manual_seed(3)
    model, gates = gated_toy()
    x, c = batch()
    state = torch.get_rng_state()
    y1 = torch.utils.checkpoint.checkpoint(model, x, c, use_reentrant=False)
    y2 = torch.utils.checkpoint.checkpoint(model, x, c, use_reentrant=False)
    grads = gradients(model, gates, y1.square().mean() + y2.square().mean())
    torch.set_rng_state(state)
    expected = gradients(model, gates, model(x, c).square().mean() + model(x, c).square().mean())
    assert_same_gradients(grads, expected)


def test_each_sample_has_its_own_mask_for_the_batch():
    model, gates = gated_toy(depth=8)
    masks = lambda: torch.stack(  # noqa: E731
        [gates.masks.column(gates.stacks[0], unit, 64) for unit in range(8)], 1
    )
    first = masks()
    assert torch.equal(masks(), first)
    assert len({tuple(row) for row in first.tolist()}) > 4
    assert set(first.unique().tolist()) == {0.0, 1.0}
    assert (first.view(64, 4, 2).sum(-1) == 1).all()
    gates.redraw()
    assert not torch.equal(masks(), first)


def test_evaluation_is_deterministic_and_equals_the_model_without_the_dropped_blocks():
    model, gates = gated_toy(init=([0.0, 0.1], [0.2, 0.0]))
    for _ in range(3):
        gates.update_average()
    model.eval()
    x, c = batch()
    h = model.embed(x)
    bare = copy.deepcopy(model)
    remove_gates(bare)
    for i in (1, 2):
        h = bare.blocks[i](h, c)
    torch.testing.assert_close(model(x, c), bare.head(h))
    torch.testing.assert_close(model(x, c), model(x, c), rtol=0, atol=0)


@pytest.mark.parametrize("kind", [PairToy, AttnToy])
def test_tuples_follow_the_plain_formula(kind):
    torch.manual_seed(0)
    model = kind()
    x, _ = batch()
    gates = DepthGates(model, "1:2")
    noise = noise_for(gates)
    gates.fix_noise(noise)
    loss = model(x).square().mean()
    ours = gradients(model, gates, loss)
    bare = copy.deepcopy(model)
    remove_gates(bare)
    masks = reference_masks(gates, noise)
    if kind is PairToy:
        a, b = x, x.flip(1)[:, :2]
        for i, block in enumerate(bare.blocks):
            m = masks[:, i].view(-1, 1, 1)
            new_a, new_b = block((a, b))
            a, b = m * new_a + (1 - m) * a, m * new_b + (1 - m) * b
        expected = (a.sum(1) + b.sum(1)).square().mean()
    else:
        h, extras = x, []
        for i, block in enumerate(bare.blocks):
            m = masks[:, i].view(-1, 1, 1)
            y, extra = block(h)
            h = m * y + (1 - m) * h
            extras.append(extra)
        expected = (h + sum(e[:, None, None] for e in extras)).square().mean()
    torch.testing.assert_close(loss, expected)
    named = {
        **dict(bare.named_parameters()),
        **{f"gate{i}": p for i, p in enumerate(gates.logits())},
    }
    assert_same_gradients(
        ours,
        dict(zip(named, torch.autograd.grad(expected, list(named.values()), allow_unused=True))),
    )
    model.eval()
    assert isinstance(model(x), torch.Tensor)


def test_a_table_of_as_many_rows_as_samples_is_shared():
    torch.manual_seed(0)
    model = Toy()
    gates = DepthGates(model, "1:2")
    n = T  # as many samples as tokens: (T, D) could be either
    x, c = batch(n=n)
    table = torch.randn(T, D)
    noise = noise_for(gates, n=n)
    gates.fix_noise(noise)
    h = model.embed(x)
    for block in model.blocks:
        h = block(h, c, table)
    bare = copy.deepcopy(model)
    remove_gates(bare)
    masks, expected = reference_masks(gates, noise), model.embed(x)
    for i, block in enumerate(bare.blocks):
        m = masks[:, i].view(-1, 1, 1)
        expected = m * block(expected, c, table) + (1 - m) * expected
    torch.testing.assert_close(h, expected)
    for block in model.blocks:
        (plan,) = block.forward.__self__.plans.values()
        assert plan.per_sample == {"c": 0} and not plan.plain_because


def test_a_shared_table_is_not_indexed_by_sample():
    model, gates = gated_toy()
    x, _ = batch()
    noise = noise_for(gates)
    gates.fix_noise(noise)
    table = torch.randn(T, D)
    h = model.embed(x)
    for block in model.blocks:
        h = block(h, None, table)
    bare = copy.deepcopy(model)
    remove_gates(bare)
    masks, expected = reference_masks(gates, noise), model.embed(x)
    for i, block in enumerate(bare.blocks):
        m = masks[:, i].view(-1, 1, 1)
        expected = m * block(expected, None, table) + (1 - m) * expected
    torch.testing.assert_close(h, expected)


def test_batch_norm_in_a_block_selects_the_plain_formula():
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.lin = nn.BatchNorm1d(T), nn.Linear(D, D)

        def forward(self, x):
            return x + self.lin(self.norm(x))

    torch.manual_seed(0)
    model = nn.Sequential()
    model.blocks = nn.Sequential(*[Norm() for _ in range(2)])
    gates = DepthGates(model, "1:2", stacks="blocks")
    noise = noise_for(gates)
    gates.fix_noise(noise)
    x, _ = batch()
    bare = copy.deepcopy(model)
    remove_gates(bare)
    got, masks, expected = model(x), reference_masks(gates, noise), x
    for i, block in enumerate(bare.blocks):
        m = masks[:, i].view(-1, 1, 1)
        expected = m * block(expected) + (1 - m) * expected
    torch.testing.assert_close(got, expected)


def test_autocast_keeps_gradients_of_weights_first_seen_without_a_graph():
    """A low-precision copy cached by autocast under no_grad would cut the second forward's graph."""
    model, gates = gated_toy(init=([9.0, 0.0], [9.0, 0.0]))
    x, c = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = model(x, c).float().square().mean()
        with torch.no_grad():
            gates.logits()[0].copy_(torch.tensor([0.0, 9.0]))
        gates.redraw()
        second = model(x, c).float().square().mean()
    (first + second).backward()
    assert model.blocks[1].lin.weight.grad.any()


def test_gradients_under_autocast_are_those_of_float32_up_to_its_rounding():
    model, gates = gated_toy()
    x, c = batch(n=32)
    noise = noise_for(gates, n=32)
    gates.fix_noise(noise)
    expected, theirs = plain(model, gates, noise, x, c)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(x, c).float().square().mean()
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)
    for name, grad in gradients(model, gates, loss).items():
        assert (grad - theirs[name]).norm() <= 5e-2 * theirs[name].norm(), name


def test_a_deep_copy_has_gates_of_its_own():
    model, gates = gated_toy()
    holder = nn.ModuleDict({"model": model, "gates": gates})
    twin = copy.deepcopy(holder)
    assert twin["model"].blocks[0].forward.__self__.owner is twin["gates"]
    assert twin["model"].blocks[0].forward.__self__.block is twin["model"].blocks[0]
    x, c = batch()
    twin["model"](x, c).sum().backward()
    assert all(p.grad is None for p in holder.parameters())
    assert all(p.grad is not None for p in twin["gates"].parameters())


def test_dropped_samples_do_not_reach_the_blocks_graph():
    model, gates = gated_toy(pattern="1:2")
    sizes = []
    model(*batch(n=16))  # the first call learns the block's batch axes
    model.blocks[0].lin.register_forward_hook(
        lambda m, a, out: sizes.append((out.shape[0], out.requires_grad))
    )
    x, c = batch(n=16)
    model(x, c)
    with_graph = [n for n, graph in sizes if graph]
    without = [n for n, graph in sizes if not graph]
    assert sum(with_graph) + sum(without) == 16 and without and with_graph


def test_state_dict_keys_stay_as_they_were():
    torch.manual_seed(0)
    model = Toy()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.depth_gates = DepthGates(model, "1:2")
    assert list(model.state_dict()) == list(before)
    assert {id(p) for p in model.depth_gates.logits()} <= {id(p) for p in model.parameters()}
    model.load_state_dict(before)


def test_remove_gates_gives_every_block_its_own_forward_back():
    model, gates = gated_toy()
    remove_gates(model)
    assert all("forward" not in block.__dict__ for block in model.blocks)
    assert not model._forward_pre_hooks and not model._forward_hooks
    DepthGates(model, "1:2")


def test_gates_on_gates_are_refused():
    model, gates = gated_toy()
    with pytest.raises(ValueError, match="carries gates already"):
        DepthGates(model, "1:2")


def test_masks_differ_by_rank_under_equal_seeds():
    masks = []
    for rank in (0, 1):
        model, gates = gated_toy(depth=8, rank=rank)
        torch.manual_seed(7)
        gates.redraw()
        masks.append(gates.masks.column(gates.stacks[0], 0, 32))
    assert not torch.equal(*masks)


# -- what only looks like what it is ---------------------------------------------------------------
class Dropping(nn.Module):
    """Records what its dropout let through."""

    def __init__(self):
        super().__init__()
        self.lin, self.seen = nn.Linear(6, 6), []

    def forward(self, x):
        let = nn.functional.dropout(torch.ones_like(x), 0.5)
        self.seen.append(let)
        return x + self.lin(x) * let


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_recomputed_blocks_dropout_lets_through_what_it_did_before(use_reentrant):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Dropping() for _ in range(2))

        def forward(self, x):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=use_reentrant)
            return x

    torch.manual_seed(0)
    model = Model()
    DepthGates(model, "1:2")
    model(torch.randn(8, 3, 6))  # the first call learns the block's batch axes
    for block in model.blocks:
        block.seen.clear()
    model(torch.randn(8, 3, 6, requires_grad=True)).sum().backward()
    for block in model.blocks:
        half = len(block.seen) // 2
        assert half and all(
            torch.equal(a, b) for a, b in zip(block.seen[:half], block.seen[half:], strict=True)
        )


def test_the_first_parameter_is_gated_whatever_the_order_of_keywords():
    class Model(Toy):
        def forward(self, x, c=None):
            for block in self.blocks:
                x = block(c=c, x=x)
            return x

    torch.manual_seed(0)
    model = Model(2)
    gates = DepthGates(model, "1:2", init=0.0)
    with torch.no_grad():
        gates.logits()[0].copy_(torch.tensor([9.0, 0.0]))  # all samples keep block 0
    x, c = torch.randn(4, 3, 6), torch.randn(4, 6)
    torch.testing.assert_close(
        model(x, c), model.blocks[0].__class__.forward(model.blocks[0], x, c)
    )


class Biased(nn.Module):
    """An addend between tokens, (heads, T, T), shared by all samples."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(6, 6)

    def forward(self, x, bias):
        scores = torch.einsum("ntd,nsd->nts", x, x)[:, None] + bias  # (N, heads, T, T)
        return x + torch.einsum("nhts,nsd->ntd", scores.softmax(-1), self.lin(x))


def test_a_bias_of_as_many_heads_as_samples_is_not_indexed_by_sample():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Biased() for _ in range(4))

        def forward(self, x, bias):
            for block in self.blocks:
                x = block(x, bias)
            return x

    torch.manual_seed(0)
    model = Model()
    gates = DepthGates(model, "1:2")
    bias = torch.randn(4, 3, 3)
    for num_samples in (4, 4, 7, 4):  # as many as heads, and another number in between
        x = torch.randn(num_samples, 3, 6)
        fixed = {"blocks": [s.noise(num_samples) for s in gates.stacks[0].distributions]}
        results = []
        for gather in (True, False):
            gates.gather = gather
            gates.fix_noise(fixed)
            model.zero_grad()
            output = model(x, bias)
            output.square().sum().backward()
            results.append([output.detach(), *(p.grad.clone() for p in model.parameters())])
        for ours, plain in zip(*results, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-3)
