import math

import pytest
import torch

from goldens_util import assert_near
from tinyfusion_pl.objectives import GaussianDiffusion

SIGNAL = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)


class Oracle:
    """The best denoiser for normal data of mean 2y - 5 and the given spread (0: a single point), and what it was asked."""

    num_classes = 5

    def __init__(self, spread=0.0, learn_sigma=True):
        self.spread, self.learn_sigma, self.asked = spread, learn_sigma, []

    def __call__(self, x, t, y):
        self.asked.append((len(x), t.tolist(), y.tolist()))
        a = SIGNAL[t].view(-1, 1, 1, 1)
        mean = (2.0 * y - 5).view(-1, 1, 1, 1)
        epsilon = (
            (1 - a).sqrt() * (x.double() - a.sqrt() * mean) / (a * self.spread**2 + 1 - a)
        ).float()
        return torch.cat([epsilon, torch.full_like(x, -1.0)], 1) if self.learn_sigma else epsilon


def labels(n):
    return torch.arange(n) % 5


@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 1.0)])
@pytest.mark.parametrize("num_sampling_steps", [1, 2, 20])
def test_data_of_one_point_is_found_exactly(learn_sigma, sampler, eta, num_sampling_steps):
    z, y = torch.randn(5, 1, 2, 2), labels(5)
    objective, oracle = GaussianDiffusion(learn_sigma=learn_sigma), Oracle(learn_sigma=learn_sigma)
    x = objective.sample(
        oracle, z, y, sampler=sampler, eta=eta, num_sampling_steps=num_sampling_steps
    )
    assert_near(x, (2.0 * y - 5).view(-1, 1, 1, 1).expand_as(x), 1e-3)


@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 1.0)])
def test_normal_data_is_sampled_with_its_mean_and_spread(sampler, eta):
    n = 4000
    x = GaussianDiffusion().sample(
        Oracle(spread=0.5),
        torch.randn(n, 1, 1, 1),
        torch.full((n,), 3),
        sampler=sampler,
        eta=eta,
        num_sampling_steps=200,
    )
    assert abs(x.mean() - 1) < 0.04 and abs(x.std() - 0.5) < 0.03


def test_the_denoiser_is_asked_at_the_original_timesteps_from_the_noisiest():
    oracle, objective = Oracle(), GaussianDiffusion()
    objective.sample(oracle, torch.randn(3, 1, 2, 2), labels(3), num_sampling_steps=4)
    assert [t for _, t, _ in oracle.asked] == [[step] * 3 for step in (999, 666, 333, 0)]


def test_without_guidance_the_batch_is_not_doubled():
    oracle = Oracle()
    GaussianDiffusion().sample(
        oracle, torch.randn(3, 1, 2, 2), labels(3), num_sampling_steps=2, guidance_scale=1.0
    )
    assert [(n, y) for n, _, y in oracle.asked] == [(3, [0, 1, 2])] * 2


def test_guidance_asks_for_the_null_label_beside_each_label():
    oracle = Oracle()
    GaussianDiffusion().sample(
        oracle, torch.randn(3, 1, 2, 2), labels(3), num_sampling_steps=2, guidance_scale=1.5
    )
    assert [(n, y) for n, _, y in oracle.asked] == [(6, [0, 1, 2, 5, 5, 5])] * 2


@pytest.mark.parametrize(("guidance_channels", "guided"), [(3, 3), (1, 1), (None, 4), (9, 4)])
def test_guidance_moves_the_first_channels_or_all_away_from_the_null_label(
    guidance_channels, guided
):
    z, y, scale = torch.randn(2, 4, 2, 2), torch.tensor([1, 4]), 1.5
    x = GaussianDiffusion().sample(
        Oracle(),
        z,
        y,
        num_sampling_steps=20,
        sampler="ddim",
        guidance_scale=scale,
        guidance_channels=guidance_channels,
    )
    plain, null = 2.0 * y - 5, 2.0 * 5 - 5
    expected = torch.stack(
        [null + scale * (plain - null) if c < guided else plain for c in range(4)], 1
    )
    assert_near(x, expected[..., None, None].expand_as(x), 1e-3)


def test_the_same_noise_gives_the_same_samples_and_a_generator_can_draw_it():
    objective, z, y = GaussianDiffusion(), torch.randn(3, 1, 2, 2), labels(3)

    def sampled(**options):
        return objective.sample(Oracle(spread=1.0), z, y, num_sampling_steps=5, **options)

    noise = torch.randn(5, 3, 1, 2, 2, generator=torch.Generator().manual_seed(7))
    assert torch.equal(sampled(noise=noise), sampled(noise=noise))
    assert not torch.equal(sampled(noise=noise), sampled(noise=-noise))
    ours = sampled(generator=torch.Generator().manual_seed(7))
    torch.manual_seed(99)  # the global state has no part in it
    assert torch.equal(ours, sampled(generator=torch.Generator().manual_seed(7)))
    assert not torch.equal(ours, sampled(generator=torch.Generator().manual_seed(8)))


def test_the_first_noise_is_for_the_noisiest_step_and_the_last_step_draws_none():
    objective, z, y = GaussianDiffusion(), torch.randn(2, 1, 2, 2), labels(2)
    noise = torch.randn(4, 2, 1, 2, 2)

    def sampled(noise):
        return objective.sample(Oracle(spread=1.0), z, y, num_sampling_steps=4, noise=noise)

    for step, matters in enumerate([True, True, True, False]):
        other = noise.clone()
        other[step] += 1
        assert torch.equal(sampled(noise), sampled(other)) != matters


@pytest.mark.parametrize("num_sampling_steps", [2, 10, 1000])
def test_ddim_with_eta_one_is_ddpm_with_the_posterior_variance(num_sampling_steps):
    objective, z, y = GaussianDiffusion(), torch.randn(3, 1, 2, 2), labels(3)
    options = {
        "num_sampling_steps": num_sampling_steps,
        "noise": torch.randn(num_sampling_steps, *z.shape),
    }
    ddpm = objective.sample(Oracle(spread=1.0), z, y, **options)
    assert_near(
        objective.sample(Oracle(spread=1.0), z, y, sampler="ddim", eta=1.0, **options), ddpm, 1e-3
    )


def test_ddim_without_eta_draws_nothing():
    objective, z, y = GaussianDiffusion(), torch.randn(3, 1, 2, 2), labels(3)
    state = torch.get_rng_state()
    objective.sample(Oracle(spread=1.0), z, y, num_sampling_steps=5, sampler="ddim")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_clipped_predictions_end_in_the_range_of_the_data(sampler):
    x = GaussianDiffusion().sample(
        Oracle(),
        torch.randn(5, 1, 2, 2),
        labels(5),
        num_sampling_steps=10,
        sampler=sampler,
        clip_denoised=True,
    )
    assert_near(x, torch.tensor([-1.0, -1, -1, 1, 1]).view(-1, 1, 1, 1).expand_as(x), 1e-3)


def test_sampling_keeps_no_graph_and_leaves_the_starting_noise():
    layer = torch.nn.Conv2d(1, 2, 1)
    z = torch.randn(2, 1, 2, 2)
    before = z.clone()
    x = GaussianDiffusion().sample(lambda x, t, y: layer(x), z, labels(2), num_sampling_steps=3)
    assert not x.requires_grad and torch.equal(z, before)


@pytest.mark.parametrize(
    "options", [{}, {"sampler": "ddim"}, {"clip_denoised": True}, {"guidance_scale": 2.0}]
)
def test_a_denoiser_that_gives_nan_gives_nan_samples(options):
    def broken(x, t, y):
        return (
            torch.tensor([math.nan, 0.0]).view(1, 2, 1, 1).expand(len(x), 2, 2, 2)
        )  # epsilon, variance

    broken.num_classes = 5
    x = GaussianDiffusion().sample(
        broken, torch.randn(2, 1, 2, 2), labels(2), num_sampling_steps=3, **options
    )
    assert x.isnan().all()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"sampler": "euler"}, "'euler'; give one of 'ddim', 'ddpm'"),
        ({"eta": -0.1}, "eta is -0.1"),
        ({"eta": math.nan}, "eta is nan"),
        ({"num_sampling_steps": 0}, "num_sampling_steps is 0; give 1 to 1000"),
        ({"num_sampling_steps": 1001}, "num_sampling_steps is 1001"),
        ({"guidance_channels": 0}, "guidance_channels is 0"),
        ({"noise": torch.zeros(2, 2, 1, 2, 2)}, r"\(2, 2, 1, 2, 2\); expected \(3, 2, 1, 2, 2\)"),
    ],
)
def test_settings_out_of_range_are_named_before_the_denoiser_runs(wrong, said):
    oracle = Oracle()
    with pytest.raises(ValueError, match=said):
        GaussianDiffusion().sample(
            oracle, torch.randn(2, 1, 2, 2), labels(2), **{"num_sampling_steps": 3, **wrong}
        )
    assert not oracle.asked
