"""``compile: true``: blocks run compiled, and nothing else changes."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from torch._dynamo.utils import counters

from tasks.toy_fit import Killed, final, fit
from tinyfusion_pl import Recovery, create_model
from tinyfusion_pl.data import DigitsDataModule
from tinyfusion_pl.distill import Distillation
from tinyfusion_pl.objectives import GaussianDiffusion
from tinyfusion_pl.tasks import Fit, RunFolder


@pytest.fixture
def traced(monkeypatch):
    """Dynamo traces blocks as ever, and runs what it traced with eager kernels: the same numbers to the last bit."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    yield counters
    torch._dynamo.reset()


def assert_close(found, expected):
    """Tensors of a nested structure; a lone sample runs as two where blocks are compiled, which changes last digits."""
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_close(found[key], value)
    elif isinstance(expected, torch.Tensor) and expected.is_floating_point():
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pruning", [
    {"weight_update": "full", "search_loss": "teacher"}, pytest.param({}, marks=pytest.mark.slow)], ids=["teacher", "lora"])  # fmt: skip
def test_a_compiled_search_is_the_plain_one(traced, tmp_path, pruning):
    """Through a kill as well; few graphs serve all gated blocks, whatever the number of samples that keep one."""
    fit(tmp_path / "plain", pruning=pruning, max_steps=4)
    assert not traced["stats"]
    with pytest.raises(Killed):
        fit(tmp_path / "compiled", pruning=pruning, max_steps=4, compile=True, kill=2)
    fit(tmp_path / "compiled", pruning=pruning, max_steps=4, compile=True)
    plain, compiled = final(tmp_path / "plain"), final(tmp_path / "compiled")
    for key in ("state_dict", "current_model_state", "DepthPruningCallback"):
        assert_close(compiled[key], plain[key])
    assert 0 < traced["stats"]["unique_graphs"] <= 2 * 4 and not traced["graph_break"]


def recovery(folder, *, compile, distillation):
    seed_everything(0)
    size = {"hidden_size": 16, "num_heads": 2}
    teacher, student = (
        create_model("dit_digits", depth=4, **size),
        create_model("dit_digits", depth=2, **size),
    )
    for model in (teacher, student):  # new blocks are the identity
        for block in model.blocks:
            torch.nn.init.normal_(block.adaLN_modulation[1].weight, std=0.1)
    module = Recovery(
        student, teacher=teacher, objective=GaussianDiffusion(), distillation=distillation
    )
    trainer = partial(Trainer, accelerator="cpu", max_steps=3, max_epochs=-1, enable_progress_bar=False, enable_model_summary=False,
                      use_distributed_sampler=False, log_every_n_steps=1)  # fmt: skip
    fitted = Fit(trainer=trainer, compile=compile)
    fitted.run("recover", RunFolder(folder), module, DigitsDataModule(batch_size=4))
    assert all(
        block._compiled_call_impl is None for model in (teacher, student) for block in model.blocks
    )
    return module.state_dict()


def test_a_compiled_recovery_is_the_plain_one(traced, tmp_path):
    """Hidden states are collected anew in each step, and not at all where the weight has fallen to 0."""
    distillation = partial(Distillation, pairs={"blocks": [(0, 1), (1, 3)]})
    plain = recovery(tmp_path / "plain", compile=False, distillation=distillation())
    compiled = recovery(tmp_path / "compiled", compile=True, distillation=distillation())
    assert list(plain) == list(compiled) and all(
        torch.equal(plain[key], compiled[key]) for key in plain
    )
    assert 0 < traced["stats"]["unique_graphs"] <= 4 and not traced["graph_break"]
    without = recovery(
        tmp_path / "without", compile=True, distillation=distillation(weight_feature=0.0)
    )
    assert any(not torch.equal(plain[key], without[key]) for key in plain)


@pytest.mark.slow  # compiles kernels, which takes a minute
def test_compiled_kernels_learn_the_same(tmp_path):
    torch._dynamo.reset()
    fit(tmp_path / "plain", max_steps=3)
    fit(tmp_path / "compiled", max_steps=3, compile=True)
    plain, compiled = (
        final(tmp_path / "plain")["state_dict"],
        final(tmp_path / "compiled")["state_dict"],
    )
    assert list(plain) == list(compiled)
    for key, value in plain.items():
        torch.testing.assert_close(compiled[key], value, rtol=1e-3, atol=1e-4)
