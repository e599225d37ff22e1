"""What every family of denoisers promises, at sizes that take a moment."""

import copy

import pytest
import torch

from goldens_util import assert_near
from tinyfusion_pl.models import create_model

LATENTS = (4, 8, 8)  # (C, H, W)
NUM_CLASSES = 5

# A registered name of the family -> arguments that make it tiny.
FAMILIES = {
    "dit_xl_2": {
        "input_size": 8,
        "hidden_size": 32,
        "depth": 3,
        "num_heads": 2,
        "num_classes": NUM_CLASSES,
    },
    "sit_xl_2": {
        "input_size": 8,
        "hidden_size": 32,
        "depth": 3,
        "num_heads": 2,
        "num_classes": NUM_CLASSES,
    },
}


def family(name):
    """A tiny model of the family in evaluation mode, its zero-initialised parts not zero any more."""
    model = create_model(name, **FAMILIES[name])
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def batch(n=3):
    return torch.randn(n, *LATENTS), torch.linspace(0, 1, n), torch.arange(n) % NUM_CLASSES


def gradients(model, inputs, target):
    model.zero_grad()
    (model(*inputs).float() * target).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_states_its_stacks_and_rebuilds_from_its_config(name):
    model, inputs = family(name), batch()
    for path, argument in model.STACKS.items():
        assert len(model.get_submodule(path)) == model.config[argument] >= 2
    again = create_model(name, **model.config).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(*inputs), model(*inputs))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_denoiser_compiles_without_a_graph_break_to_the_same_numbers(name):
    model, inputs = family(name), batch()
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    with torch.no_grad():
        assert_near(compiled(*inputs), model(*inputs), 1e-5)
    target = torch.randn_like(model(*inputs))
    expected, found = (
        gradients(model.train(), inputs, target),
        gradients(compiled.train(), inputs, target),
    )
    for key, value in expected.items():
        assert_near(found[f"_orig_mod.{key}"], value, 1e-4, key)


@pytest.mark.parametrize("name", FAMILIES)
def test_bf16_autocast_is_within_two_percent_of_float32(name):
    model, inputs = family(name), batch()
    with torch.no_grad():
        expected = model(*inputs)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(*inputs)
    assert output.dtype == inputs[0].dtype and not torch.equal(output, expected)
    difference = (output - expected).norm() / expected.norm()
    assert difference < 2e-2, f"{difference:.2e}"


@pytest.mark.parametrize("name", FAMILIES)
def test_activation_checkpointing_recomputes_every_block_and_gives_equal_gradients(name):
    model, inputs = family(name).train(), batch()
    twin = create_model(name, **FAMILIES[name], activation_checkpointing=True).train()
    twin.load_state_dict(model.state_dict())
    calls = {id(block): 0 for path in twin.STACKS for block in twin.get_submodule(path)}

    def count(block, *_):
        calls[id(block)] += 1

    for path in twin.STACKS:
        for block in twin.get_submodule(path):
            block.register_forward_pre_hook(count)
    target = torch.randn_like(model(*inputs))
    expected, found = (gradients(each, inputs, target) for each in (model, twin))
    assert set(calls.values()) == {2}
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert_near(found[key], value, 1e-6, key)


def test_a_share_of_the_blocks_is_recomputed():
    model = create_model(
        "dit", input_size=8, hidden_size=16, depth=4, num_heads=2, activation_checkpointing=0.5
    ).train()
    calls = [0] * 4
    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    for _ in range(2):
        model(
            torch.randn(2, 4, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.long)
        ).square().mean().backward()
    assert calls == [2, 4, 2, 4]
    with pytest.raises(
        ValueError, match=r"activation_checkpointing is 1\.5; give true, false, or a share"
    ):
        create_model("dit", depth=1, activation_checkpointing=1.5)
