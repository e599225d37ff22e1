import pytest
import torch

from goldens_util import assert_near, golden_files, load, new_dit, part, pattern_in_name
from tinyfusion_pl.objectives import GaussianDiffusion
from tinyfusion_pl.pruning import DepthGates


def case(file):
    golden = load(file)
    model = new_dit(part(golden, "weights")).train()
    gates = DepthGates(
        model,
        pattern_in_name(file),
        stacks="blocks",
        scaling=golden["scaling"].item(),
        tau=golden["tau"].item(),
        average_decay=0.0,
    )
    with torch.no_grad():
        for i, logits in enumerate(gates.logits()):
            logits.copy_(golden[f"weights.gumbel_gates.{i}"].flatten())
    gates.update_average()
    gates.fix_noise({"blocks": [golden[f"gumbel_noise.{i}"] for i in range(len(gates.logits()))]})
    return golden, model, gates


@pytest.mark.golden
@pytest.mark.parametrize("file", golden_files("mask_learning_*"))
def test_against_reference_losses_and_every_gradient(file):
    golden, model, gates = case(file)
    objective = GaussianDiffusion()
    draw = objective.draw(golden["x0"], t=golden["t"], noise=golden["noise"])
    loss = objective.losses(model(draw.x_t, draw.t, golden["y"]), draw)["loss"]
    assert_near(loss, golden["loss"], 1e-5, "loss")
    loss.mean().backward()
    ours = dict(model.named_parameters()) | {
        f"gumbel_gates.{i}": p for i, p in enumerate(gates.logits())
    }
    theirs = part(golden, "grad")
    assert theirs.keys() <= ours.keys()
    for name, grad in theirs.items():
        assert ours[name].grad is not None, name
        assert_near(ours[name].grad, grad.view_as(ours[name]), 1e-4, name)


@pytest.mark.golden
@pytest.mark.parametrize("file", golden_files("mask_learning_*"))
def test_against_reference_kept_layers_and_candidates(file):
    golden, _, gates = case(file)
    assert gates.decide().kept_blocks == {"blocks": golden["kept_layers"].tolist()}
    for i, sampler in enumerate(gates.stacks[0].distributions):
        assert torch.equal(sampler.candidates, golden[f"candidates.{i}"])


@pytest.mark.golden
@pytest.mark.parametrize("file", golden_files("mask_learning_*"))
def test_against_reference_the_plain_formula_gives_the_same(file):
    """gather=False is what benchmarks and fallbacks rest on."""
    golden, model, gates = case(file)
    gates.gather = False
    objective = GaussianDiffusion()
    draw = objective.draw(golden["x0"], t=golden["t"], noise=golden["noise"])
    loss = objective.losses(model(draw.x_t, draw.t, golden["y"]), draw)["loss"]
    assert_near(loss, golden["loss"], 1e-5, "loss")
