import copy
import math
from itertools import accumulate, repeat

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from goldens_util import assert_near
from tinyfusion_pl.objectives import GaussianDiffusion
from tinyfusion_pl.objectives.gaussian_process import spaced_timesteps
from tinyfusion_pl.objectives.likelihood import discretized_gaussian_log_likelihood

T = torch.tensor([0, 1, 300, 999])


@pytest.fixture
def objective():
    return GaussianDiffusion()


def drawn(objective):
    return objective.draw(torch.randn(4, 2, 4, 4).clamp(-1, 1), t=T)


def step_distribution(output, x_t, t):
    """p(x_{t-1} | x_t) that an output describes, in float64, from Nichol & Dhariwal's equations 11, 12 and 15."""
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    bar = (1 - beta).cumprod(0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
    tilde = (1 - before) / (1 - bar) * beta
    tilde[0] = tilde[1]
    beta, bar, before, tilde = (table[t].view(-1, 1, 1, 1) for table in (beta, bar, before, tilde))
    epsilon, v = output.double().chunk(2, 1)
    mean = (x_t.double() - beta / (1 - bar).sqrt() * epsilon) / (1 - beta).sqrt()
    fraction = (v + 1) / 2
    return Normal(mean, (fraction * beta.log() + (1 - fraction) * tilde.log()).div(2).exp())


def test_a_draw_is_the_closed_form_of_the_forward_process(objective):
    x0, noise = torch.randn(4, 2, 4, 4), torch.randn(4, 2, 4, 4)
    draw = objective.draw(x0, t=T, noise=noise)
    signal = (
        (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)[T].view(-1, 1, 1, 1)
    )
    assert_near(draw.x_t, signal.sqrt() * x0 + (1 - signal).sqrt() * noise, 1e-6)
    assert draw.x0 is x0 and draw.noise is noise and draw.t is T


def test_every_timestep_is_drawn_and_noise_is_standard_normal(objective):
    draw = objective.draw(torch.zeros(20000, 1, 2, 2))
    assert torch.equal(draw.t.unique(), torch.arange(1000))
    assert abs(draw.noise.mean()) < 0.02 and abs(draw.noise.std() - 1) < 0.02


def test_vb_is_the_divergence_from_the_true_step_in_bits(objective):
    draw, output = drawn(objective), torch.randn(4, 4, 4, 4)
    perfect = torch.cat(
        [draw.noise, torch.full_like(draw.noise, -1)], 1
    )  # the posterior q(x_{t-1} | x_t, x_0)
    p, q = (step_distribution(o, draw.x_t, draw.t) for o in (output, perfect))
    expected = kl_divergence(q, p).flatten(1).mean(1) / math.log(2)
    assert_near(objective.losses(output, draw)["vb"][1:], expected[1:], 1e-4)


def test_vb_of_the_first_step_is_the_likelihood_of_the_data_in_bits(objective):
    draw, output = drawn(objective), torch.randn(4, 4, 4, 4)
    p = step_distribution(output, draw.x_t, draw.t)
    nats = (
        discretized_gaussian_log_likelihood(draw.x0.double(), p.mean, p.stddev.log())
        .flatten(1)
        .mean(1)
    )
    assert_near(objective.losses(output, draw)["vb"][:1], -nats[:1] / math.log(2), 1e-4)


def test_loss_is_the_sum_of_its_terms_and_mse_looks_at_epsilon_alone(objective):
    draw, variance = drawn(objective), torch.randn(4, 2, 4, 4)
    losses = objective.losses(torch.cat([draw.noise + 0.5, variance], 1), draw)
    assert losses.keys() == {"loss", "mse", "vb"}
    assert_near(losses["mse"], torch.full((4,), 0.25), 1e-5)
    assert torch.equal(losses["loss"], losses["mse"] + losses["vb"])


@pytest.mark.parametrize("term", ["vb", "vb_kd"])
def test_variational_terms_teach_the_variance_only(objective, term):
    draw, output = drawn(objective), torch.randn(4, 4, 4, 4, requires_grad=True)
    terms = objective.losses(output, draw) | objective.distillation_losses(
        output, torch.randn(4, 4, 4, 4), draw
    )
    terms[term].sum().backward()
    of_epsilon, of_variance = output.grad.chunk(2, 1)
    assert not of_epsilon.any()
    assert all(of_variance[i].any() for i in range(4))


@pytest.mark.parametrize("term", ["mse", "mse_kd"])
def test_square_errors_teach_the_mean_only(objective, term):
    draw, output = drawn(objective), torch.randn(4, 4, 4, 4, requires_grad=True)
    terms = objective.losses(output, draw) | objective.distillation_losses(
        output, torch.randn(4, 4, 4, 4), draw
    )
    terms[term].sum().backward()
    of_epsilon, of_variance = output.grad.chunk(2, 1)
    assert of_epsilon.any() and not of_variance.any()


def test_distillation_is_square_error_plus_divergence_from_the_teachers_step(objective):
    draw, output, teacher = drawn(objective), torch.randn(4, 4, 4, 4), torch.randn(4, 4, 4, 4)
    terms = objective.distillation_losses(output, teacher, draw)
    assert terms.keys() == {"loss_kd", "mse_kd", "vb_kd"}
    p, q = (step_distribution(o, draw.x_t, draw.t) for o in (output, teacher))
    expected = kl_divergence(q, p).flatten(1).mean(1) / math.log(2)
    assert_near(terms["vb_kd"][1:], expected[1:], 1e-4)
    assert_near(terms["mse_kd"], (output - teacher)[:, :2].square().flatten(1).mean(1), 1e-5)
    assert torch.equal(terms["loss_kd"], terms["mse_kd"] + terms["vb_kd"])


def test_a_student_equal_to_its_teacher_has_nothing_to_learn_after_the_first_step(objective):
    draw, output = drawn(objective), torch.randn(4, 4, 4, 4)
    assert objective.distillation_losses(output, output, draw)["loss_kd"][1:].abs().max() < 1e-6


def test_no_gradient_reaches_the_teacher(objective):
    draw, teacher = drawn(objective), torch.randn(4, 4, 4, 4, requires_grad=True)
    output = torch.randn(4, 4, 4, 4, requires_grad=True)
    objective.distillation_losses(output, teacher, draw)["loss_kd"].sum().backward()
    assert teacher.grad is None and output.grad.any()


def test_without_learned_variance_the_loss_is_the_square_error():
    objective = GaussianDiffusion(learn_sigma=False)
    draw = objective.draw(torch.randn(4, 2, 4, 4), t=T)
    assert_near(objective.losses(draw.noise + 2, draw)["loss"], torch.full((4,), 4.0), 1e-5)
    kd = objective.distillation_losses(draw.noise + 2, draw.noise - 1, draw)
    assert_near(kd["loss_kd"], torch.full((4,), 9.0), 1e-5)


def test_half_precision_outputs_are_compared_in_float32(objective):
    draw, output = drawn(objective), torch.randn(4, 4, 4, 4).bfloat16()
    losses = objective.losses(output, draw)
    assert losses["loss"].dtype == torch.float32
    assert torch.equal(losses["loss"], objective.losses(output.float(), draw)["loss"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_denoiser_that_is_not_finite_is_not_hidden(objective, bad):
    draw, output = drawn(objective), torch.randn(4, 4, 4, 4)
    output[:, 1, 2, 2] = bad
    assert not objective.losses(output, draw)["loss"].isfinite().any()
    assert (
        not objective.distillation_losses(output, torch.zeros_like(output), draw)["loss_kd"]
        .isfinite()
        .any()
    )


@pytest.mark.parametrize("position", ["mean", "variance"])
def test_nan_stays_in_the_samples_that_have_it(objective, position):
    draw, output = drawn(objective), torch.randn(4, 4, 4, 4)
    output[0, 1 if position == "mean" else 3] = math.nan
    loss = objective.losses(output, draw)["loss"]
    assert loss.isfinite().tolist() == [False, True, True, True]


@pytest.mark.parametrize(("mean", "scale"), [(0.1, 0.3), (-0.9, 0.05), (1.4, 1.0)])
def test_the_likelihood_of_all_256_values_sums_to_one(mean, scale):
    values = torch.linspace(-1, 1, 256, dtype=torch.float64)
    mean, log_scale = torch.full_like(values, mean), torch.full_like(values, math.log(scale))
    log_likelihood = discretized_gaussian_log_likelihood(values, mean, log_scale)
    assert abs(log_likelihood.exp().sum() - 1) < 1e-6


def test_the_likelihood_is_that_of_the_normal_distribution_in_the_bin():
    values = torch.linspace(-1, 1, 256, dtype=torch.float64)
    normal = Normal(torch.tensor(0.2, dtype=torch.float64), 0.3)
    upper, lower = normal.cdf(values + 1 / 255), normal.cdf(values - 1 / 255)
    upper[-1], lower[0] = 1, 0
    mean, log_scale = torch.full_like(values, 0.2), torch.full_like(values, math.log(0.3))
    wrong = (
        discretized_gaussian_log_likelihood(values, mean, log_scale).exp() - (upper - lower)
    ).abs()
    # The published losses approximate the distribution function to 1.8e-4; only the two open bins
    # see that undiminished.
    assert wrong[1:-1].max() < 2e-5 and wrong.max() < 2e-4


@pytest.mark.parametrize("count", [1, 2, 8, 21, 23, 250, 999, 1000])
def test_respaced_steps_add_up_the_stride_as_published_ones(count):
    sums = accumulate(repeat(999 / max(count - 1, 1), count - 1), initial=0.0)
    assert spaced_timesteps(1000, count).tolist() == [round(t) for t in sums]


def test_respaced_steps_are_distinct_and_reach_from_the_first_to_the_last():
    for count in range(2, 1001):
        steps = spaced_timesteps(1000, count)
        assert len(steps) == len(steps.unique()) == count and steps[0] == 0 and steps[-1] == 999


def test_a_respaced_process_has_the_noise_of_the_whole_one_at_its_steps(objective):
    tables, timesteps = objective.respaced(50)
    assert_near(tables.alphas_cumprod, objective.tables.alphas_cumprod[timesteps], 1e-10)


def test_a_copy_gives_the_same_losses(objective):
    draw, output = drawn(objective), torch.randn(4, 4, 4, 4)
    assert torch.equal(
        copy.deepcopy(objective).losses(output, draw)["loss"],
        objective.losses(output, draw)["loss"],
    )


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"noise_schedule": "sigmoid"}, "'sigmoid'; give one of 'linear', 'cosine'"),
        ({"num_timesteps": 20}, "num_timesteps is 20, .* at least 21"),
        ({"num_timesteps": 0}, "num_timesteps is 0"),
    ],
)
def test_settings_without_a_process_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        GaussianDiffusion(**wrong)


def test_the_fewest_timesteps_give_finite_losses():
    objective = GaussianDiffusion(num_timesteps=21)
    draw = objective.draw(torch.randn(21, 1, 2, 2), t=torch.arange(21))
    assert objective.losses(torch.zeros(21, 2, 2, 2), draw)["loss"].isfinite().all()


@pytest.mark.parametrize(("learn_sigma", "channels", "expected"), [(True, 2, 4), (False, 4, 2)])
def test_a_denoiser_with_other_channels_is_named(learn_sigma, channels, expected):
    objective = GaussianDiffusion(learn_sigma=learn_sigma)
    with pytest.raises(
        ValueError, match=f"{channels} channels for 2-channel latents; .* expects {expected}"
    ):
        objective.losses(torch.zeros(4, channels, 4, 4), drawn(objective))
