"""A sampler of one's own: registered by name, then available wherever samplers are named."""

import pytest
import torch
from torch import nn

from tinyfusion_pl.objectives import GaussianDiffusion
from tinyfusion_pl.objectives.gaussian_samplers import SAMPLERS, register_sampler
from tinyfusion_pl.objectives.gaussian_samplers.base import StepSampler


@pytest.fixture
def to_data():
    """A sampler that goes to the predicted data at once, and stays there."""

    @register_sampler("to_data")
    class ToData(StepSampler):
        def is_random(self, options):
            return False

        def step(self, tables, x, t, x0, fraction, options):
            return x0, torch.zeros(())

    yield ToData
    del SAMPLERS["to_data"]


class Zero(nn.Module):
    num_classes = 10

    def forward(self, x, t, y):
        return torch.zeros_like(x)


def test_a_registered_sampler_is_available_by_name(to_data):
    objective, z = GaussianDiffusion(learn_sigma=False), torch.randn(2, 1, 4, 4)
    assert objective.num_noises(sampler="to_data", num_sampling_steps=1) == 0
    sampled = objective.sample(
        Zero(), z, torch.zeros(2).long(), sampler="to_data", num_sampling_steps=1
    )
    signal = 1 - 1e-4  # of the first timestep of the linear schedule; the predicted noise is 0
    assert torch.allclose(sampled, z / signal**0.5, atol=1e-6)


def test_a_taken_name_is_refused(to_data):
    with pytest.raises(ValueError, match="'to_data' already"):
        register_sampler("to_data")(to_data)
