"""Gates on models of other libraries: dropping by gates equals cutting out, and gathering equals the plain formula."""

import copy

import pytest
import torch
from torch import nn

from foreign.zoo import COUPLED, ZOO, sample_of
from tinyfusion_pl.pruning import DepthGates, find_stacks, get_stack, remove_blocks, remove_gates
from tinyfusion_pl.pruning.calls import quiet
from tinyfusion_pl.pruning.verification import earliest_drops, verify

STREAMS = {  # what each model's blocks carry, from its own source code
    "sd3": {"hidden_states", "encoder_hidden_states"}, "sd35": {"hidden_states", "encoder_hidden_states"},
    "flux": {"hidden_states", "encoder_hidden_states"}, "qwen_image": {"hidden_states", "encoder_hidden_states"},
    "hunyuanvideo": {"hidden_states", "encoder_hidden_states"}, "cogvideox": {"hidden_states", "encoder_hidden_states"},
}  # fmt: skip


def gated(name, **kwargs):
    model, make_inputs, stacks = ZOO[name].build()
    patterns = {
        path: "1:2" if len(get_stack(model, path)) % 2 == 0 else f"1:{len(get_stack(model, path))}"
        for path in stacks
    }
    model.train()
    return model, make_inputs, DepthGates(model, patterns, stacks=stacks, **kwargs)


def cut_copy(model, gates, kept):
    bare = copy.deepcopy(model)
    remove_gates(bare)
    return remove_blocks(bare, {g.path: g.get_blocks(kept[g.path]) for g in gates.stacks})


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_dropping_by_gates_equals_cutting_out(name):
    model, make_inputs, gates = gated(name)
    args, kwargs = make_inputs(3)
    kept = {g.path: earliest_drops(g) for g in gates.stacks}
    with quiet(model, seed=1):
        with gates.masks.forced(kept):
            by_gates = sample_of(model(*args, **kwargs))
        with gates.bypass():
            whole = sample_of(model(*args, **kwargs))
    cut = cut_copy(model, gates, kept)
    with quiet(cut, seed=1):
        expected = sample_of(cut(*args, **kwargs))
    torch.testing.assert_close(by_gates, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(whole, expected, rtol=1e-3, atol=1e-4), (
        "dropping blocks changed nothing: the test is empty"
    )
    streams = {
        n
        for gated in gates.gated_forwards
        for plan in gated.plans.values()
        for n in plan.streams.names
    }
    assert STREAMS.get(name, streams) == streams


@pytest.mark.parametrize("name", ZOO)
def test_the_decision_in_evaluation_equals_cutting_out(name):
    model, make_inputs, gates = gated(name)
    args, kwargs = make_inputs(3)
    model.eval()
    kept = {g.path: g.kept_units() for g in gates.stacks}
    cut = cut_copy(model, gates, kept).eval()
    with torch.no_grad():
        torch.manual_seed(1)
        decided = sample_of(model(*args, **kwargs))
        torch.manual_seed(1)
        torch.testing.assert_close(decided, sample_of(cut(*args, **kwargs)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ZOO)
def test_gathered_gradients_equal_the_plain_formula(name):
    model, make_inputs, gates = gated(name)
    args, kwargs = make_inputs(4)
    model.requires_grad_(False)
    for g in gates.stacks:
        get_stack(model, g.path).requires_grad_(True)
    results = []
    for gather in (True, False):
        gates.gather = gather
        for p in (*model.parameters(), *gates.logits()):
            p.grad = None
        with quiet(model, seed=1), torch.enable_grad():
            for gate in gates.gated_forwards:
                gate.block.training = True  # masks, while what is inside stays quiet
            output = sample_of(model(*args, **kwargs))
        (
            output.float() * torch.sin(torch.arange(output.numel())).view(output.shape)
        ).sum().backward()
        tensors = [*gates.logits(), *(p for p in model.parameters() if p.requires_grad)]
        results.append(
            [
                output.detach(),
                *(torch.zeros_like(t) if t.grad is None else t.grad.clone() for t in tensors),
            ]
        )
    assert any(g.abs().max() > 0 for g in results[1][1 : 1 + len(gates.logits())])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(
            ours, plain, rtol=2e-3, atol=2e-3 * float(plain.abs().max().clamp_min(1e-2))
        )
    assert not any(
        plan.plain_because for gated in gates.gated_forwards for plan in gated.plans.values()
    )


@pytest.mark.slow  # the rows of the page on any transformer check the same
@pytest.mark.parametrize("name", ZOO)
def test_verification_accepts_it(name):
    model, make_inputs, gates = gated(name)
    args, kwargs = make_inputs(2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    verify(model, gates, args, kwargs)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("name", COUPLED)
def test_what_depends_on_a_blocks_place_is_refused(name):
    model, make_inputs, stacks = (
        COUPLED[name]() if callable(COUPLED[name]) else COUPLED[name].build()
    )
    model.train()
    gates = DepthGates(model, "1:2", stacks=stacks)
    args, kwargs = make_inputs(2)
    with pytest.raises(ValueError, match="cannot be pruned as it is called"):
        verify(model, gates, args, kwargs)


def test_text_as_long_as_the_image_is_told_apart_by_name():
    model, make_inputs, stacks = ZOO["flux"].build(text_length=16)
    args, kwargs = make_inputs(3)
    assert kwargs["hidden_states"].shape[1] == kwargs["encoder_hidden_states"].shape[1]
    model.train()
    gates = DepthGates(model, "1:2", stacks=stacks)
    verify(model, gates, args, kwargs)
    plans = [next(iter(gated.plans.values())) for gated in gates.gated_forwards]
    assert {plan.streams.inputs[0] for plan in plans} == {"encoder_hidden_states"}


@pytest.mark.parametrize("batch_size", [1, 2, 9])  # 9: as many samples as tokens
def test_sequence_first_layers_gate_samples_not_tokens(batch_size):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=False)
    model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False).train()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    gates = DepthGates(model, "1:2", stacks="layers")
    x = torch.randn(9, batch_size, 16)
    out = model(x)
    masks = torch.stack(
        [gates.masks.column(gates.stacks[0], i, batch_size) for i in range(4)], 1
    ).detach()
    bare = copy.deepcopy(model)
    remove_gates(bare)
    h = x
    for i, block in enumerate(bare.layers):
        m = masks[:, i].view(1, -1, 1)
        h = m * block(h) + (1 - m) * h
    torch.testing.assert_close(out, h)
    assert all(plan.axis == 1 for gated in gates.gated_forwards for plan in gated.plans.values())


def test_a_block_with_a_cache_runs_once_with_whole_gradients():
    model, make_inputs, stacks = ZOO["llama"].build(use_cache=True)
    model.train()
    _, kwargs = make_inputs(2)
    grads = []
    for cached in (True, False):
        torch.manual_seed(0)
        gates = DepthGates(model, "1:2", stacks=stacks)
        kwargs["use_cache"] = cached
        sample_of(model(**kwargs)).square().sum().backward()
        grads.append([p.grad.clone() for p in gates.logits()])
        remove_gates(model)
    for with_cache, without in zip(*grads, strict=True):
        torch.testing.assert_close(
            with_cache, without, rtol=1e-4, atol=1e-4 * float(without.abs().max())
        )


def test_what_is_found_is_what_is_gated():
    model, _, stacks = ZOO["flux"].build()
    assert list(find_stacks(model)) == stacks == [g.path for g in DepthGates(model, "1:2").stacks]


def test_a_call_of_nan_is_not_verified_but_the_next_one_is():
    from tinyfusion_pl.pruning.first_call import FirstCallCheck

    model, make_inputs, gates = gated(
        "dit_diffusers" if "dit_diffusers" in ZOO else next(iter(ZOO))
    )
    check = FirstCallCheck(model, gates, {g.path: g.path for g in gates.stacks})
    args, kwargs = make_inputs(3)
    broken = tuple(
        torch.full_like(a, torch.nan)
        if isinstance(a, torch.Tensor) and a.is_floating_point()
        else a
        for a in args
    )
    spoiled = {
        k: torch.full_like(v, torch.nan)
        if isinstance(v, torch.Tensor) and v.is_floating_point()
        else v
        for k, v in kwargs.items()
    }
    model(*broken, **spoiled)
    assert check.unverified
    model(*args, **kwargs)
    assert not check.unverified
