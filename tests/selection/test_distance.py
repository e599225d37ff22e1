"""The distance that criteria, trials and reports use."""

import pytest
import torch

from tinyfusion_pl.models import create_model
from tinyfusion_pl.objectives import GaussianDiffusion, Interpolants
from tinyfusion_pl.selection import Calibration

CASES = {
    "learned variance": ("dit_s_2", True, lambda: GaussianDiffusion(num_timesteps=21)),
    "fixed variance": (
        "dit_s_2",
        False,
        lambda: GaussianDiffusion(num_timesteps=21, learn_sigma=False),
    ),
    "interpolant": ("sit_s_2", True, Interpolants),
}
SMALL = {"input_size": 4, "num_classes": 3, "depth": 2, "hidden_size": 16, "num_heads": 2}


def draw_samples(case):
    """Outputs of a model for 64 samples, some of them at t = 0 of 21 steps."""
    name, learn_sigma, make_objective = CASES[case]
    torch.manual_seed(0)
    model = create_model(name, learn_sigma=learn_sigma, **SMALL).eval()
    calibration = Calibration.of(
        make_objective(), torch.randn(64, 4, 4, 4), torch.randint(3, (64,))
    ).ask(model)
    return calibration, torch.arange(64)


@pytest.mark.parametrize("case", CASES)
def test_the_teacher_has_no_distance_to_itself(case):
    calibration, index = draw_samples(case)
    assert torch.equal(calibration.distances(calibration.target, index), torch.zeros(64))


@pytest.mark.parametrize("case", [case for case in CASES if case != "interpolant"])
def test_it_is_the_mean_square_of_the_predictions(case):
    calibration, index = draw_samples(case)
    output = calibration.target + 0.1 * torch.randn_like(calibration.target)
    assert (calibration.context.t == 0).any()
    expected = (output - calibration.target)[:, :4].square().mean((1, 2, 3))
    assert torch.allclose(calibration.distances(output, index), expected, atol=1e-7)
