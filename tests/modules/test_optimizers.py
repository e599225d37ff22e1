"""Optimizers in their fastest form: fused on a GPU, 8 bits where they are asked for."""

import sys

import pytest
import torch
from torch import nn

from tinyfusion_pl import create_model
from tinyfusion_pl.distill.teacher import lowered
from tinyfusion_pl.modules import optimizers
from tinyfusion_pl.modules.optimizers import adamw_8bit, use_fused


def stepped(optimizer_class=torch.optim.AdamW, fuse=False, **options):
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(50))
    optimizer = optimizer_class([parameter], lr=0.1, **options)
    if fuse:
        use_fused(optimizer)
    for _ in range(3):
        parameter.grad = torch.randn(50)
        optimizer.step()
    return optimizer, parameter.detach()


def test_adamw_is_fused_on_a_gpu_alone(monkeypatch):
    plain, expected = stepped(fuse=True)
    assert plain.param_groups[0]["fused"] is None
    monkeypatch.setattr(optimizers, "FUSED_ON", ("cpu",))  # as if this were one
    fused, found = stepped(fuse=True)
    assert fused.param_groups[0]["fused"] is True and not hasattr(
        fused, "_step_supports_amp_scaling"
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    restored, _ = stepped(fuse=True)
    restored.load_state_dict(fused.state_dict())
    assert restored.param_groups[0]["fused"] is True


@pytest.mark.parametrize("told", [{"foreach": False}, {"fused": False}])
def test_what_an_optimizer_was_told_stays(monkeypatch, told):
    monkeypatch.setattr(optimizers, "FUSED_ON", ("cpu",))
    assert not stepped(fuse=True, **told)[0].param_groups[0]["fused"]


def test_without_bitsandbytes_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(
        ValueError, match=r"pip install 'tinyfusion_pl\[eight_bit\]', or give optimizer=adamw"
    ):
        adamw_8bit([nn.Parameter(torch.zeros(1))], lr=1e-3)


def test_eight_bits_learn_what_thirty_two_do():
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    found = []
    for make in (adamw_8bit, torch.optim.AdamW):
        torch.manual_seed(0)
        parameter = nn.Parameter(torch.randn(64, 128))
        optimizer = make([parameter], lr=1e-2, weight_decay=0.0)
        for _ in range(20):
            parameter.grad = 2 * parameter.detach()  # of the sum of squares
            optimizer.step()
        found.append(parameter.detach())
    assert (found[0] - found[1]).abs().mean() < 0.02
    assert (
        sum(v.nbytes for v in optimizer.state[parameter].values() if torch.is_tensor(v))
        > 8 * parameter.numel()
    )


@pytest.mark.parametrize("name", ["dit_digits"])
def test_a_lowered_teacher_says_the_same_under_autocast(name):
    torch.manual_seed(0)
    model = create_model(name, depth=2, hidden_size=16, num_heads=2).eval().requires_grad_(False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    half = lowered(model, torch.bfloat16)
    config = model.config
    x = torch.randn(3, config["in_channels"], config["input_size"], config["input_size"])
    with torch.autocast("cpu", torch.bfloat16):
        t, y = torch.tensor([1.0, 500.0, 999.0]), torch.tensor([0, 1, 2])
        assert torch.equal(half(x, t, y), model(x, t, y))
    assert (
        model.blocks[0].mlp.fc1.weight.dtype == torch.float32
        and half.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    )
    assert list(half.state_dict()) == list(model.state_dict())
