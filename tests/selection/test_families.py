"""Criteria of depth on models whose blocks go in pairs (U-ViT) and whose stacks are several (U-DiT)."""

import copy

import pytest
import torch

from small_dit_model import small_batch
from tinyfusion_pl.models import create_model, load_shallow, save_shallow
from tinyfusion_pl.objectives import GaussianDiffusion
from tinyfusion_pl.pruning import remove_blocks
from tinyfusion_pl.selection import Calibration, select_blocks

SMALL = {"input_size": 8, "in_channels": 4, "num_classes": 10, "num_heads": 2, "hidden_size": 16}
MODELS = {
    "uvit_s_2": {"depth": 6},
    "udit_s": {
        "depth_encoder_1": 1,
        "depth_encoder_2": 2,
        "depth_latent": 2,
        "depth_decoder_2": 2,
        "depth_decoder_1": 1,
    },
}
NUM_UNITS, NUM_KEPT = {"uvit_s_2": 3, "udit_s": 8}, {"uvit_s_2": 1, "udit_s": 5}


def small(name):
    model = create_model(name, **SMALL, **MODELS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def choose(model, criterion, keep):
    objective = GaussianDiffusion(learn_sigma=model.out_channels == 8)

    def draw(n):
        return Calibration.of(objective, torch.randn(n, 4, 8, 8), torch.randint(10, (n,)))

    return select_blocks(
        model, draw, criterion=criterion, keep=keep, num_samples=4, with_simple_rule=False
    )


@pytest.mark.parametrize("criterion", ["shortgpt", "sensitivity", "taylor", "greedy"])
@pytest.mark.parametrize("name", MODELS)
def test_units_go_whole_and_every_stack_keeps_a_block(name, criterion, tmp_path):
    model = small(name)
    decision = choose(model, criterion, NUM_KEPT[name])
    units = [
        (set(unit), set(stack.kept_blocks))
        for stack in decision.stacks.values()
        for unit in stack.units
    ]
    assert len(units) == NUM_UNITS[name] and all(
        unit <= kept or not unit & kept for unit, kept in units
    )
    assert sum(unit <= kept for unit, kept in units) == NUM_KEPT[name]
    assert all(stack.kept_blocks for stack in decision.stacks.values())
    shallow = remove_blocks(copy.deepcopy(model), decision.kept_blocks)
    save_shallow(tmp_path, shallow, {"stacks": decision.as_dict()})
    args = small_batch(2)
    with torch.no_grad():
        assert torch.equal(load_shallow(tmp_path)(*args), shallow(*args))


def test_rules_by_place_take_a_budget_for_each_stack():
    model = small("udit_s")
    with pytest.raises(ValueError, match="no block of decoder_level_1.*Give a budget for each"):
        choose(model, "uniform", 5)
    budget = {"encoder_level_2": 1, "latent": 1, "decoder_level_2": 1}
    assert choose(model, "uniform", budget).kept_blocks == {path: [0] for path in budget}
