import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

import tinyfusion_pl.cli  # noqa: F401  (registers the resolvers that main.yaml uses)
from tinyfusion_pl.models import UViT
from tinyfusion_pl.objectives import GaussianDiffusion


def test_scaled_linear_is_stable_diffusions():
    betas = GaussianDiffusion(noise_schedule="scaled_linear", learn_sigma=False).tables.betas
    other = DDIMScheduler(
        num_train_timesteps=1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
    ).betas
    np.testing.assert_allclose(betas, other, rtol=1e-5)  # diffusers' are float32
    assert betas.dtype == torch.float64


def test_a_uvit_trains_and_samples_by_its_configured_objective():
    with initialize_config_module("tinyfusion_pl.conf", version_base="1.3"):
        cfg = compose("main", ["objective=noise", "model=uvit_h_2"])
    objective = instantiate(cfg.objective)
    assert objective.num_timesteps == 1000 and cfg.model.timestep_offset == 1
    model = UViT(input_size=8, in_channels=2, hidden_size=16, depth=2, num_heads=2, num_classes=5)
    x, y = torch.randn(4, 2, 8, 8), torch.tensor([0, 1, 4, 5])
    draw = objective.draw(x)
    losses = objective.losses(model(draw.x_t, draw.t, y), draw)
    assert losses.keys() == {"loss", "mse"}
    samples = objective.sample(
        model,
        torch.randn_like(x),
        torch.tensor([0, 1, 2, 3]),
        num_sampling_steps=3,
        guidance_scale=2.0,
    )
    assert samples.shape == x.shape and samples.isfinite().all()


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_no_timesteps_are_refused(schedule):
    with pytest.raises(
        ValueError, match=f"num_timesteps is 0, too few for the {schedule} schedule"
    ):
        GaussianDiffusion(num_timesteps=0, noise_schedule=schedule)
