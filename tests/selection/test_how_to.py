"""A custom criterion, as docs/how_to/add_a_criterion.md writes it, runs by name and by YAML."""

import sys
from types import ModuleType

import pytest
import torch
import yaml
from hydra.utils import instantiate

from how_to_pages import code_blocks
from small_dit_model import small_dit
from tinyfusion_pl.objectives import GaussianDiffusion
from tinyfusion_pl.selection import CRITERIA, Calibration, select_blocks

FILE, CALL = code_blocks("add_a_criterion", "python")
MODULE = "tinyfusion_pl.selection.criteria.last"


@pytest.fixture
def names(monkeypatch):
    """The page's names, with its criterion as a module; CRITERIA is restored."""
    module = ModuleType(MODULE)
    monkeypatch.setitem(sys.modules, MODULE, module)
    monkeypatch.setattr("tinyfusion_pl.selection.criteria.last", module, raising=False)
    monkeypatch.setitem(CRITERIA, "last", None)
    exec(FILE, module.__dict__)
    model = small_dit()
    size = model.config["input_size"]

    def batch(n):
        return torch.randn(n, model.config["in_channels"], size, size), torch.zeros(n).long()

    learn_sigma = model.out_channels > model.config["in_channels"]
    return {
        "Last": module.Last,
        "model": model,
        "objective": GaussianDiffusion(learn_sigma=learn_sigma),
        "batch": batch,
    }


def test_the_criterion_of_the_page_runs_by_name(names):
    exec(CALL, names)
    stack = names["decision"].stacks["blocks"]
    assert stack.kept_blocks == [stack.num_blocks - 2, stack.num_blocks - 1]
    assert stack.criterion == "last"


def test_the_yaml_of_the_page_makes_the_same_choice(names):
    exec(CALL, names)
    (text,) = code_blocks("add_a_criterion", "yaml")
    criterion = instantiate(yaml.safe_load(text)["criterion"])
    decision = select_blocks(
        names["model"],
        lambda n: Calibration.of(names["objective"], *names["batch"](n)),
        criterion=criterion,
        keep=2,
        num_samples=8,
    )
    assert decision.kept_blocks == names["decision"].kept_blocks
