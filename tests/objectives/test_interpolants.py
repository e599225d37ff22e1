import copy
import math

import pytest
import torch

from goldens_util import assert_near
from objectives.interpolant_oracle import PATHS, path_at
from tinyfusion_pl.objectives import GaussianDiffusion, Interpolants
from tinyfusion_pl.objectives.paths import PREDICTIONS, coefficients

T = torch.tensor([0.02, 0.3, 0.77, 0.99])
BOTH = [(path, prediction) for path in PATHS for prediction in PREDICTIONS]


def case(path, t=T):
    """Data, noise, x_t, and what each prediction should be of them, in float64 from the definitions."""
    x0, noise = torch.randn(len(t), 2, 3, 3), torch.randn(len(t), 2, 3, 3)
    alpha, sigma, d_alpha, d_sigma = path_at(path, t)
    targets = {
        "velocity": d_alpha * x0 + d_sigma * noise,
        "noise": noise.double(),
        "score": -noise / sigma,
    }
    return x0, noise, alpha * x0 + sigma * noise, targets


@pytest.mark.parametrize("path", PATHS)
def test_coefficients_and_derivatives_are_those_of_the_path(path):
    c = coefficients(path, T.view(-1, 1, 1, 1))
    for ours, theirs in zip((c.alpha, c.sigma, c.d_alpha, c.d_sigma), path_at(path, T)):
        assert_near(ours, theirs, 1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_time_runs_from_noise_to_data(path):
    objective, x0, noise = Interpolants(path=path), torch.randn(2, 1, 2, 2), torch.randn(2, 1, 2, 2)
    x_t = objective.draw(x0, t=torch.tensor([0.0, 1.0]), noise=noise).x_t
    assert_near(x_t[0], noise[0], 0.02)  # VP leaves 0.7% of the signal
    assert_near(x_t[1], x0[1], 1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_a_draw_is_the_closed_form_of_the_path(path):
    x0, noise, x_t, _ = case(path)
    draw = Interpolants(path=path).draw(x0, t=T, noise=noise)
    assert_near(draw.x_t, x_t, 1e-5)
    assert draw.x0 is x0 and draw.noise is noise and draw.t is T


@pytest.mark.parametrize(("path", "prediction"), BOTH)
@pytest.mark.parametrize("wanted", PREDICTIONS)
def test_predictions_turn_into_each_other(path, prediction, wanted):
    _, _, x_t, targets = case(path)
    c = coefficients(path, T.double().view(-1, 1, 1, 1))
    assert_near(getattr(c, wanted)(prediction, targets[prediction], x_t), targets[wanted], 1e-9)


@pytest.mark.parametrize(("path", "prediction"), BOTH)
def test_a_perfect_prediction_has_no_loss_and_the_loss_is_the_mean_square_of_its_error(
    path, prediction
):
    x0, noise, _, targets = case(path)
    objective = Interpolants(path=path, prediction=prediction)
    draw = objective.draw(x0, t=T, noise=noise)
    perfect, error = targets[prediction].float(), torch.randn(4, 2, 3, 3)
    assert objective.losses(perfect, draw)["loss"].max() < 1e-6
    seen = error * path_at(path, T)[1] if prediction == "score" else error
    assert_near(
        objective.losses(perfect + error, draw)["loss"], seen.square().flatten(1).mean(1), 1e-3
    )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", ["noise", "score"])
def test_the_velocity_weighting_is_the_loss_of_the_velocity_that_the_output_says(path, prediction):
    x0, noise, x_t, targets = case(path)
    objective = Interpolants(path=path, prediction=prediction, loss_weighting="velocity")
    draw, output = objective.draw(x0, t=T, noise=noise), torch.randn(4, 2, 3, 3)
    alpha, sigma, d_alpha, d_sigma = path_at(path, T)
    said = output.double() if prediction == "noise" else -sigma * output  # the noise
    velocity = d_alpha * (x_t - sigma * said) / alpha + d_sigma * said
    expected = (velocity - targets["velocity"]).square().flatten(1).mean(1)
    assert_near(objective.losses(output, draw)["loss"], expected, 1e-4)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", ["noise", "score"])
def test_the_likelihood_weighting_is_the_scores_error_times_the_diffusion(path, prediction):
    x0, noise, _, targets = case(path)
    objective = Interpolants(path=path, prediction=prediction, loss_weighting="likelihood")
    draw, output = objective.draw(x0, t=T, noise=noise), torch.randn(4, 2, 3, 3)
    alpha, sigma, d_alpha, d_sigma = path_at(path, T)
    score = output.double() if prediction == "score" else -output / sigma
    # Half the square of the forward SDE's noise: what makes its variance sigma^2 where its drift is
    # (d_alpha / alpha) x.
    half_square = sigma * (d_alpha / alpha * sigma - d_sigma)
    expected = (half_square * (score - targets["score"]).square()).flatten(1).mean(1)
    assert_near(objective.losses(output, draw)["loss"], expected, 1e-4)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("prediction", "loss_weighting"),
    [
        ("velocity", "none"),
        *(
            (prediction, weighting)
            for prediction in ("noise", "score")
            for weighting in ("none", "velocity", "likelihood")
        ),
    ],
)
def test_a_student_equal_to_its_teacher_has_nothing_to_learn_and_no_gradient_reaches_the_teacher(
    path, prediction, loss_weighting
):
    objective = Interpolants(path=path, prediction=prediction, loss_weighting=loss_weighting)
    draw, output = (
        objective.draw(torch.randn(4, 2, 3, 3)),
        torch.randn(4, 2, 3, 3, requires_grad=True),
    )
    same = objective.distillation_losses(output, output.detach().clone(), draw)
    assert same.keys() == {"loss_kd"} and torch.equal(same["loss_kd"], torch.zeros(4))
    teacher = torch.randn(4, 2, 3, 3, requires_grad=True)
    objective.distillation_losses(output, teacher, draw)["loss_kd"].sum().backward()
    assert teacher.grad is None and all(output.grad[i].any() for i in range(4))


@pytest.mark.parametrize("prediction", ["velocity", "noise"])
def test_distillation_is_the_mean_square_difference_of_the_outputs(prediction):
    objective = Interpolants(prediction=prediction)
    draw, output, teacher = (
        objective.draw(torch.randn(4, 2, 3, 3)),
        torch.randn(4, 2, 3, 3),
        torch.randn(4, 2, 3, 3),
    )
    assert_near(
        objective.distillation_losses(output, teacher, draw)["loss_kd"],
        (output - teacher).square().flatten(1).mean(1),
        1e-6,
    )


@pytest.mark.parametrize(("path", "prediction"), BOTH)
def test_drawn_times_are_uniform_and_keep_off_singular_ends(path, prediction):
    objective = Interpolants(path=path, prediction=prediction)
    draw = objective.draw(torch.randn(20000, 1, 1, 1))
    start, end = {("linear", "velocity"): (0, 0), ("gvp", "velocity"): (0, 0)}.get(
        (path, prediction), (1e-3, 1e-3)
    )
    if path == "vp":
        start, end = 0, 1e-5
    assert start <= draw.t.min() < start + 1e-3 and 1 - end - 1e-3 < draw.t.max() <= 1 - end + 1e-7
    assert abs(draw.t.mean() - 0.5) < 0.01 and abs(draw.t.std() - 12**-0.5) < 0.01
    losses = objective.losses(torch.zeros(20000, 1, 1, 1), draw)["loss"]
    assert losses.isfinite().all()


def test_another_distance_from_the_ends_is_kept():
    draw = Interpolants(prediction="noise", train_eps=0.2).draw(torch.randn(1000, 1, 1, 1))
    assert 0.2 <= draw.t.min() < 0.22 and 0.78 < draw.t.max() <= 0.8


def test_half_precision_outputs_are_compared_in_float32():
    objective, output = Interpolants(), torch.randn(4, 2, 3, 3).bfloat16()
    draw = objective.draw(torch.randn(4, 2, 3, 3))
    losses = objective.losses(output, draw)
    assert losses["loss"].dtype == torch.float32 and torch.equal(
        losses["loss"], objective.losses(output.float(), draw)["loss"]
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_not_finite_stays_in_its_sample_and_is_not_hidden(bad):
    objective, output = Interpolants(), torch.randn(4, 2, 3, 3)
    output[1, 0, 2, 2] = bad
    draw = objective.draw(torch.randn(4, 2, 3, 3))
    assert objective.losses(output, draw)["loss"].isfinite().tolist() == [True, False, True, True]


def test_a_denoiser_with_a_learned_variance_is_refused_by_name():
    objective = Interpolants()
    draw = objective.draw(torch.randn(4, 2, 3, 3))
    with pytest.raises(
        ValueError, match=r"\(4, 4, 3, 3\) for latents of shape \(4, 2, 3, 3\).*a SiT"
    ):
        objective.losses(torch.zeros(4, 4, 3, 3), draw)
    with pytest.raises(
        ValueError, match="2 channels for 2-channel latents"
    ):  # and the other way round
        GaussianDiffusion().losses(torch.zeros(4, 2, 3, 3), draw)


def test_a_copy_gives_the_same_losses():
    objective, output = Interpolants(path="gvp", prediction="noise"), torch.randn(4, 2, 3, 3)
    draw = objective.draw(torch.randn(4, 2, 3, 3))
    assert torch.equal(
        copy.deepcopy(objective).losses(output, draw)["loss"],
        objective.losses(output, draw)["loss"],
    )


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"path": "cosine"}, "path is 'cosine'; give one of 'linear', 'gvp', 'vp'"),
        ({"prediction": "x0"}, "prediction is 'x0'; give one of 'velocity'"),
        ({"loss_weighting": "snr"}, "loss_weighting is 'snr'"),
        ({"loss_weighting": "velocity"}, "a velocity loss supports 'none' only"),
        ({"train_eps": 0.5}, "train_eps is 0.5"),
        ({"sample_eps": -1e-3}, "sample_eps is -0.001"),
        ({"sample_eps": math.nan}, "sample_eps is nan"),
    ],
)
def test_settings_without_a_process_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        Interpolants(**wrong)
