"""A custom sampler, as docs/how_to/add_a_sampler.md writes it, is available by name."""

import pytest
import torch
import yaml
from torch import nn

from how_to_pages import code_blocks
from tinyfusion_pl.objectives import GaussianDiffusion
from tinyfusion_pl.objectives.gaussian_samplers import SAMPLERS, GaussianSampling, register_sampler

FILE, CALL = code_blocks("add_a_sampler", "python")


@pytest.fixture
def to_data():
    """The page's sampler: it goes to the predicted data at once, and stays there."""
    names = {}
    exec(FILE, names)
    yield names["ToData"]
    del SAMPLERS["to_data"]


class Zero(nn.Module):
    num_classes = 10

    def forward(self, x, t, y):
        return torch.zeros_like(x)


def test_the_sampler_of_the_page_is_available_by_name(to_data):
    objective, z = GaussianDiffusion(learn_sigma=False), torch.randn(2, 1, 4, 4)
    assert objective.num_noises(sampler="to_data", num_sampling_steps=1) == 0
    names = {"objective": objective, "denoiser": Zero(), "z": z, "y": torch.zeros(2).long()}
    exec(CALL, names)
    signal = 1 - 1e-4  # of the first timestep of the linear schedule; the predicted noise is 0
    assert torch.allclose(names["latents"], z / signal**0.5, atol=1e-6)


def test_the_yaml_of_the_page_holds_sampling_options(to_data):
    (text,) = code_blocks("add_a_sampler", "yaml")
    assert GaussianSampling(**yaml.safe_load(text)).num_noises(GaussianDiffusion()) == 0


def test_a_taken_sampler_name_is_refused(to_data):
    with pytest.raises(ValueError, match="'to_data' already exists"):
        register_sampler("to_data")(to_data)
